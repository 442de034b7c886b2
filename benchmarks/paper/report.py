"""What the rows say: benchmarks/results/paper.json, and a picture of table 1."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt

from benchmarks.paper.ancestors import FORMS, TRAINING
from benchmarks.paper.methods import FINE, METHODS
from benchmarks.paper.rows import Row
from benchmarks.paper.setting import Setting
from benchmarks.readme import RESULTS

OURS = "fine any-size"
STAGES = {"A": "after 300 steps", "B": "after 1,000 more"}


@dataclass(frozen=True)
class Cell:
    """The FD of one method at one depth, over seeds."""

    mean: float
    spread: float


def cell(rows: Sequence[Row], method: str, depth: int, stage: str) -> Cell:
    wanted = {"method": method, "depth": depth, "stage": stage}
    found = [r["fd"] for r in rows if wanted.items() <= r["key"].items()]
    return Cell(statistics.mean(found), max(found) - min(found))


def wins(rows: Sequence[Row], depths: Sequence[int]) -> list[bool]:
    """Whether ours is best, or within one spread of best; of each depth after each stage."""
    won = []
    for stage in STAGES:
        for depth in depths:
            cells = {m: cell(rows, m, depth, stage) for m in (*METHODS, *FINE)}
            best = min(cells.values(), key=lambda c: c.mean)
            ours = cells[OURS]
            won.append(ours.mean <= best.mean + max(best.spread, ours.spread))
    return won


def write(setting: Setting, work: Path, floor: Row, table: Sequence[Row], sigma: Row) -> None:
    won = wins(table, setting.depths)
    result = {
        "summary": {
            "table1_wins": sum(won),
            "table1_rows": len(won),
            "sigma_300_steps_seconds": sigma["seconds"],
        },
        "floor": floor["fd"],
        "sigma": sigma,
        "rows": list(table),
    }
    (RESULTS / "paper.json").write_text(json.dumps(result) + "\n")
    draw_depths(setting, floor, table, RESULTS / "paper-depth.png")
    draw_forms(setting, work, RESULTS / "paper-forms.png")


def draw_depths(setting: Setting, floor: Row, table: Sequence[Row], file: Path) -> None:
    """FD over depth, a line for each method, with its spread; one picture for each stage."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, (stage, title) in zip(axes, STAGES.items(), strict=True):
        for method in (*METHODS, *FINE):
            cells = [cell(table, method, depth, stage) for depth in setting.depths]
            axis.errorbar(
                setting.depths,
                [c.mean for c in cells],
                [c.spread / 2 for c in cells],
                label=method,
                linewidth=2.5 if method == OURS else 1.2,
                capsize=2,
            )
        axis.axhline(floor["fd"], color="grey", linestyle=":", label="real images")
        axis.set(title=title, xlabel="depth", yscale="log", xticks=setting.depths)
    axes[0].set_ylabel("FD-EffLite0, lower is better")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    figure.savefig(file, dpi=110)
    plt.close(figure)


def draw_forms(setting: Setting, work: Path, file: Path) -> None:
    """Held-out loss over images seen, nothing retrained: a line for each form of phase 1."""
    losses: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for form in FORMS:
        log = work / f"fine-{form}" / TRAINING / "log.jsonl"
        for entry in map(json.loads, log.read_text().splitlines()):
            for size, loss in entry.get("heldout_loss", {}).items():
                points = losses.setdefault(size, {}).setdefault(form, [])
                points.append((entry["step"] * setting.batch_size, loss))
    figure, axes = plt.subplots(1, len(losses), figsize=(10, 3.6), layout="constrained")
    for axis, (size, lines) in zip(axes, losses.items(), strict=True):
        for form, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=form)
        axis.set(title=size, xlabel="images seen", yscale="log")
    axes[0].set_ylabel("held-out loss")
    axes[0].legend(fontsize=8)
    figure.savefig(file, dpi=110)
    plt.close(figure)
