"""What the rows say: benchmarks/results/paper.json, and its pictures."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.paper import cost
from benchmarks.paper.ancestors import FORMS, HELDOUT_LOSS, Ancestors, fine_name
from benchmarks.paper.budget import APPROACHES
from benchmarks.paper.methods import FINE, METHODS
from benchmarks.paper.rows import OURS, SIZES, Row, cell
from benchmarks.paper.setting import Setting
from benchmarks.parts import RESULTS

RESULT = RESULTS / "paper.json"
STAGES = {"A": "after 300 steps", "B": "after 200 more"}


def rows_so_far(setting: Setting) -> list[Row]:
    """Rows that an earlier run of the same protocol has put into the repository."""
    if not RESULT.exists():
        return []
    result = json.loads(RESULT.read_text())
    rows: list[Row] = result["rows"] if result["setting"] == repr(setting) else []
    return rows


def depth_wins(rows: Sequence[Row], setting: Setting) -> list[bool]:
    """Whether ours is best, or within one spread of best; of each depth after each stage."""
    won = []
    for stage in STAGES:
        for depth in setting.depths:
            cells = {
                method: found
                for method in (*METHODS, *FINE)
                if (found := cell(rows, table="depth", method=method, depth=depth, stage=stage))
            }
            if len(cells) < len(METHODS) + len(FINE):
                continue
            best = min(cells.values(), key=lambda c: c.mean)
            ours = cells[OURS]
            won.append(ours.mean <= best.mean + max(best.spread, ours.spread))
    return won


def budget_wins(rows: Sequence[Row], setting: Setting) -> list[bool]:
    won = []
    for share in setting.budget_shares:
        fds = {a: cell(rows, table="budget", share=share, approach=a) for a in APPROACHES}
        ours = fds.pop("fine")
        if ours is not None:
            won.append(all(other is None or ours.mean <= other.mean for other in fds.values()))
    return won


def step_ratio(rows: Sequence[Row], setting: Setting) -> int | None:
    """The largest k with FINE after s steps as good as scratch after k s, at the worst depth."""
    worst = None
    for depth in setting.depths:
        ours = cell(rows, table="depth", method=OURS, depth=depth, stage="B")
        times = [
            (multiple, cell(rows, table="cost", depth=depth, multiple=multiple))
            for multiple in setting.scratch_multiples
        ]
        if ours is None or any(scratch is None for _, scratch in times):
            return None
        better = [k for k, scratch in times if scratch and ours.mean <= scratch.mean]
        ratio = max(better, default=0)
        worst = ratio if worst is None else min(worst, ratio)
    return worst


def write(
    setting: Setting, ancestors: Ancestors, rows: Sequence[Row], families: Collection[str]
) -> None:
    """What of it is not measured yet is None, and left out of the pictures.

    `families`: versions of the shipped ones; rows of others are dropped.
    """
    counted = cost.totals(setting)
    keys = [row["key"] for row in counted]
    rows = [
        row
        for row in rows
        if ("family" not in row["key"] or row["key"]["family"] in families)
        and row["key"] not in keys
    ]
    rows += counted
    depth_won, budget_won = depth_wins(rows, setting), budget_wins(rows, setting)
    shipped = {row["key"]["shipped"]: row for row in rows if "shipped" in row["key"]}
    floor = next((row["fd"] for row in rows if "floor" in row["key"]), None)
    most = {"what": SIZES, "n": max(cost.COUNTS)}
    stored = {
        row["key"]["method"]: row["total"] for row in counted if most.items() <= row["key"].items()
    }
    unseen = shipped.get("unseen")
    quality = shipped.get("quality", {}).get("guidance 2", {})
    summary = {
        "table1_wins": sum(depth_won),
        "table1_rows": len(depth_won),
        "fine_vs_scratch_step_ratio": step_ratio(rows, setting),
        "storage_ratio_10_sizes": round(stored[cost.WHOLE] / stored[OURS], 1),
        "budget_table_wins": sum(budget_won),
        "budget_table_rows": len(budget_won),
        "zero_shot_loss_gap": unseen and round(unseen["loss"] / unseen["loss_retrained"] - 1, 4),
        "fashion_fd": quality.get("fd"),
        "fashion_fd_floor": floor,
        "fashion_class_accuracy": quality.get("class_accuracy"),
        "sigma_300_steps_seconds": shipped.get("sigma", {}).get("seconds"),
    }
    RESULT.write_text(
        json.dumps({"summary": summary, "setting": repr(setting), "rows": rows}, indent=1) + "\n"
    )
    if depth_won:
        draw_depths(setting, floor, rows, RESULTS / "paper-depth.png")
    if summary["fine_vs_scratch_step_ratio"] is not None:
        draw_steps(setting, floor, rows, RESULTS / "paper-steps.png")
    if budget_won:
        draw_budgets(floor, rows, RESULTS / "paper-budget.png")
    logs = {
        form: ancestors.directory / f"{fine_name(form, setting.network.rank)}.jsonl"
        for form in FORMS
    }
    if all(log.exists() for log in logs.values()):
        draw_forms(logs, RESULTS / "paper-forms.png")


def draw_depths(setting: Setting, floor: float | None, rows: Sequence[Row], file: Path) -> None:
    """FD over depth, a line for each method, with its spread; one picture for each stage."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), sharey=True, layout="constrained")
    for axis, (stage, title) in zip(axes, STAGES.items(), strict=True):
        for method in (*METHODS, *FINE):
            points = [
                (depth, found)
                for depth in setting.depths
                if (found := cell(rows, table="depth", method=method, depth=depth, stage=stage))
            ]
            axis.errorbar(
                [depth for depth, _ in points],
                [found.mean for _, found in points],
                [found.spread / 2 for _, found in points],
                label=method,
                linewidth=2.5 if method == OURS else 1.2,
                color="black" if method == OURS else None,
                capsize=2,
            )
        _floor(axis, floor)
        axis.set(title=title, xlabel="depth", yscale="log", xticks=setting.depths)
    axes[0].set_ylabel("FD-EffLite0, lower is better")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, file)


def draw_steps(setting: Setting, floor: float | None, rows: Sequence[Row], file: Path) -> None:
    """FD over the steps after initialisation, one picture for each depth."""
    figure, axes = plt.subplots(
        1, len(setting.depths), figsize=(12, 3.4), sharey=True, layout="constrained", squeeze=False
    )
    s = setting.sigma_steps + setting.further_steps
    ends = {"A": setting.sigma_steps, "B": s}
    for axis, depth in zip(axes.flat, setting.depths, strict=True):
        lines = {
            "scratch": {
                k * s: cell(rows, table="cost", depth=depth, multiple=k)
                for k in setting.scratch_multiples
            },
            OURS: {
                steps: cell(rows, table="depth", method=OURS, depth=depth, stage=stage)
                for stage, steps in ends.items()
            },
        }
        for label, points in lines.items():
            axis.plot(
                [*points], [found.mean for found in points.values() if found], "o-", label=label
            )
        _floor(axis, floor)
        axis.set(title=f"depth {depth}", xlabel="steps", xscale="log", yscale="log")
        ticks = [s, 2 * s, max(setting.scratch_multiples) * s]
        axis.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axis.minorticks_off()
    axes.flat[0].set_ylabel("FD-EffLite0, lower is better")
    axes.flat[0].legend(fontsize=8)
    _save(figure, file)


def draw_budgets(floor: float | None, rows: Sequence[Row], file: Path) -> None:
    """FD over the bytes that a model was measured to need."""
    figure, axis = plt.subplots(figsize=(7, 4), layout="constrained")
    for approach in APPROACHES:
        found = [
            (row["memory_bytes"] / 1e6, row["fd"])
            for row in rows
            if row["key"].get("approach") == approach and "fd" in row
        ]
        width = 2.5 if approach == "fine" else 1.2
        axis.plot(*zip(*sorted(found), strict=True), "o-", label=approach, linewidth=width)
    _floor(axis, floor)
    axis.set(xlabel="memory, MB", ylabel="FD-EffLite0, lower is better", yscale="log")
    axis.legend(fontsize=8)
    _save(figure, file)


def draw_forms(logs: dict[str, Path], file: Path) -> None:
    """Held-out loss over images seen, nothing retrained: a line for each form of phase 1."""
    losses: dict[str, dict[str, list[tuple[int, float]]]] = {}
    for form, log in logs.items():
        for entry in map(json.loads, log.read_text().splitlines()):
            for size, loss in entry[HELDOUT_LOSS].items():
                losses.setdefault(size, {}).setdefault(form, []).append((entry["images"], loss))
    figure, axes = plt.subplots(1, len(losses), figsize=(10, 3.6), layout="constrained")
    for axis, (size, lines) in zip(axes, losses.items(), strict=True):
        for form, points in lines.items():
            axis.plot(*zip(*points, strict=True), label=form)
        axis.set(title=size, xlabel="images seen", yscale="log")
    axes[0].set_ylabel("held-out loss")
    axes[0].legend(fontsize=8)
    _save(figure, file)


def _floor(axis: Any, floor: float | None) -> None:
    if floor is not None:
        axis.axhline(floor, color="grey", linestyle=":", label="real images")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)
