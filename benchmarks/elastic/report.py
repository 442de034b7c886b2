"""The tables of promises under load."""

from benchmarks.parts import Figures, Table, rows

LOADS = {"0.5x": "calm", "1x": "calm", "2x": "crowd", "4x": "crowd"}
SERVERS = {"litserve": "LitServe", "ray_serve": "Ray Serve", "bentoml": "BentoML"}


def crowd(result: Figures) -> Table:
    """Of each load: promises kept of those given, refused, quality; fixed sizes and peers."""
    parts = result["parts"]
    lines = [
        "served by | load, of what the full size sustains | within 1 s, of what was accepted "
        "| refused | quality | within 1 s, a second"
    ]
    for load, part in LOADS.items():
        if at := parts.get(part, {}).get(load):
            lines.append(
                f"elastic | {load} | **{at['kept']:.2%}** | {at['refused']:.2%} "
                f"| {at['quality']:.2f} | {at['good_per_second']:.1f}"
            )
    if trace := parts.get("trace"):
        lines.append(
            f"elastic | a flash crowd | **{trace['real_kept']:.2%}** | {trace['real_refused']:.2%} "
            f"| {trace['real_quality']:.2f} | {trace['real_good_per_second']:.1f}"
        )
        lines.append(f"the full size | a flash crowd | {trace['fixed_kept']:.1%} of all | | |")
    for name in ("full", "small"):
        if at := parts.get("crowd", {}).get(f"fixed_{name}_4x"):
            lines.append(
                f"the {name} size | 4x | {at['kept']:.1%} of all | | | {at['good_per_second']:.1f}"
            )
    for name, server in SERVERS.items():
        if at := parts.get("peers", {}).get(name):
            lines.append(
                f"{server}, the full size | 4x | {at['kept']:.1%} of all | | "
                f"| {at['good_per_second']:.1f}"
            )
    return rows("\n".join(lines))


def promises(result: Figures) -> Table:
    """One request at a time, two owners, and the simulator."""
    parts, lines = result["parts"], ["| "]
    if solo := parts.get("solo"):
        lines.append(
            f"{solo['requests']} requests one after the other, promises of 0.15 to 3 s: kept "
            f"| {solo['solo_kept']:.1%}"
        )
        lines.append(f"… end foreseen, off in the median | {solo['prediction_error_median']:.1%}")
    if fairness := parts.get("fairness"):
        lines.append(
            "a modest owner of one size beside a greedy elastic one: 95th percentile, times its "
            f"own alone | {fairness['modest_p95_ratio']:.2f}"
        )
    if trace := parts.get("trace"):
        lines.append(
            "the same flash crowd by the simulator: kept of what was accepted, and refused "
            f"| {trace['simulated_kept']:.1%}, {trace['simulated_refused']:.1%}"
        )
    return rows("\n".join(lines))
