"""The tables of the chosen form, of healing and of the import."""

from benchmarks.healing.rivals import RIVALS
from benchmarks.parts import Figures, Table, rows


def form(result: Figures) -> Table:
    parts = result["parts"]
    form, rivals = parts["form"], parts["rivals"]
    seeds = list(form["seeds"].values())
    dense, pruned, shipped = rivals["dense"], rivals["pruned"], rivals["shipped_losses"]
    depths = ("12", "10", "8", "6", "4", "3", "2")
    fds = {
        depth: sum(seed["fds"][depth] for seed in seeds) / len(seeds) for depth in seeds[0]["fds"]
    }

    def cells(values: Figures, digits: int) -> str:
        return " | ".join(
            f"{values[depth]:.{digits}f}" if depth in values else "" for depth in depths
        )

    return rows(
        f"""| {" | ".join(f"L{depth}" for depth in depths)}
        this form, mean of {len(seeds)} seeds: held-out loss | {cells(form["losses"], 4)}
        … FD | {cells(fds, 0)}
        shipped before: held-out loss | {cells(shipped, 4)}
        … FD | {cells({"12": rivals["shipped"]["fd"]}, 0)}
        dense, and pruned with everything trained: held-out loss \
            | {cells({"12": dense["loss"], "8": pruned["loss"]}, 4)}
        … FD | {cells({"12": dense["fd"], "8": pruned["fd"]}, 0)}"""
    )


def healing(result: Figures) -> Table:
    parts = result["parts"]
    cells = [(name, cell) for name in ("fashion", "emoji") for cell in parts[name]["cells"]]
    ways = (*RIVALS, "healed")
    lines = [f"| kB | 16 bits | {' | '.join(ways)}"]
    for name, cell in cells:
        losses = " | ".join(
            f"**{cell['losses'][way]:.4f}**"
            if cell["losses"][way] == min(cell["losses"].values())
            else f"{cell['losses'][way]:.4f}"
            for way in ways
        )
        what = "U and V" if cell["mode"] == "factored" else "W"
        lines.append(
            f"{name}, L{cell['depth']}, {what} in {cell['bits']} bits "
            f"| {cell['bytes'] / 1000:.0f} | {cell['loss_16_bits']:.4f} | {losses}"
        )
    return rows("\n".join(lines))


def importing(result: Figures) -> Table:
    half, xl = result["parts"]["half"], result["parts"].get("dit_xl", {})
    peak = f"{xl['peak_gb']} of {xl['of_machine_gb']}" if xl else "not measured"
    judged = "\n".join(
        f"{name} | {figures['loss']:.4f} | {figures['fd']:.0f}"
        for name, figures in half["judged"].items()
    )
    return rows(
        f"""| held-out loss | FD
        {judged}
        largest difference of the import from diffusers' | {half["import_full_max_abs_diff"]:.1e} |
        seconds of the import, ordered and calibrated | {half["import_seconds"]} |
        a DiT-XL/2 of random weights: most memory, GB | {peak} |"""
    )
