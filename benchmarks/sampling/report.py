"""The table of what a request without knobs gives."""

from benchmarks.parts import Figures, Table, rows


def sampling(result: Figures) -> Table:
    parts = result["parts"]
    lines = ["full size, 5,000 pictures, no knobs | before (DDIM, 25 steps, guidance 2) | now"]
    for name in ("fashion", "emoji"):
        if part := parts.get(name):
            lines += [
                f"{name}: FD (real images {part['floor']:.0f}) | {part['fd_before']:.0f} "
                f"| **{part['fd']:.0f}**",
                f"… class accuracy | {part['class_accuracy_before']:.1%} "
                f"| {part['class_accuracy']:.1%}",
                f"… seconds of 4 images | {part['seconds_before']:.2f} "
                f"| **{part['seconds_now']:.2f}** ({part['default_cost_over_before']:.0%})",
            ]
    return rows("\n".join(lines))


def guides(result: Figures) -> Table:
    """The best scale of each kind of guidance."""
    parts, lines = result["parts"], ["family | guided by | in steps | scale | FD | class accuracy"]
    for name in ("fashion", "emoji"):
        best: dict[tuple[str, str], Figures] = {}
        for row in parts.get(f"guides_{name}", {"rows": []})["rows"]:
            guide = row["guide"]
            by = (
                f"depth {guide['depth']}, rank {guide['rank']}"
                if guide
                else "itself, without class"
            )
            if row["guidance_scale"] == 1:
                by = "nothing"
            when = f"{row['guidance_start']:.0%} to {row['guidance_stop']:.0%}"
            if row["fd"] < best.get((by, when), {"fd": 1e9})["fd"]:
                best[by, when] = row
        lines += [
            f"{name} | {by} | {when} | {row['guidance_scale']:g} | {row['fd']:.0f} "
            f"| {row['class_accuracy']:.1%}"
            for (by, when), row in sorted(best.items(), key=lambda each: each[1]["fd"])
        ]
    return rows("\n".join(lines))
