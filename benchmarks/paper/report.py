"""What the rows say: benchmarks/results/paper.json, and its pictures."""

import itertools
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.paper import cost
from benchmarks.paper.budget import APPROACHES, BUDGETS
from benchmarks.paper.depth import STAGES
from benchmarks.paper.methods import FINE, METHODS
from benchmarks.paper.rows import OURS, SIZES, Cell, Row, cell
from benchmarks.paper.setting import FASHION, Setting
from benchmarks.parts import RESULTS
from learngenes.config import SHARED_MODES

Budget = tuple[str, float]
"""What is limited, and to which share of what the dense ancestor needs."""


def result_file(setting: Setting) -> Path:
    return RESULTS / f"{_name(setting)}.json"


def _name(setting: Setting) -> str:
    return "paper" if setting.data == FASHION else f"paper-{setting.name}"


def rows_so_far(setting: Setting) -> list[Row]:
    """Rows that an earlier run of the same protocol has put into the repository."""
    if not result_file(setting).exists():
        return []
    result = json.loads(result_file(setting).read_text())
    rows: list[Row] = result["rows"] if result["setting"] == repr(setting) else []
    return rows


def margins(rows: Sequence[Row], setting: Setting) -> list[float]:
    """By how many spreads ours is worse than the best; of each depth after each stage.

    The spread is the larger of the two; at most 1 is a win.
    """
    found = []
    for stage in STAGES:
        for depth in setting.depths:
            cells = {
                method: each
                for method in (*METHODS, *FINE)
                if (each := cell(rows, table="depth", method=method, depth=depth, stage=stage))
            }
            if len(cells) < len(METHODS) + len(FINE):
                continue
            best = min(cells.values(), key=lambda c: c.mean)
            found.append(_spreads(cells[OURS], best))
    return found


def _spreads(ours: Cell, best: Cell) -> float:
    worse = ours.mean - best.mean
    return 0.0 if worse <= 0 else worse / max(best.spread, ours.spread, 1e-9)


def budget_cells(rows: Sequence[Row], setting: Setting) -> dict[Budget, dict[str, Cell | None]]:
    """FD of each approach at the budgets that are measured; None for what does not fit."""
    found = {}
    for of in BUDGETS:
        for share in setting.budget_shares:
            wanted = {"table": "budget", "of": of, "share": share}
            here = [row for row in rows if wanted.items() <= row["key"].items()]
            if len(here) == len(APPROACHES) * len(setting.seeds):
                found[of, share] = {a: cell(here, approach=a) for a in APPROACHES}
    return found


def budget_summary(rows: Sequence[Row], setting: Setting) -> Row:
    """At how many budgets ours is dominated, and whether its shared sizes are strictly better."""
    cells, figures = budget_cells(rows, setting), {}
    for of in BUDGETS:
        at = {share: found for (what, share), found in cells.items() if what == of}
        lost = [share for share, found in at.items() if _dominated(found)]
        figures |= {f"budget_{of}_rows": len(at), f"budget_{of}_losses": len(lost)}
    shared = {
        budget
        for budget in cells
        for row in rows
        if row.get("mode") in SHARED_MODES
        and {"of": budget[0], "share": budget[1]}.items() <= row["key"].items()
    }
    won = [budget for budget in shared if _strictly_better(cells[budget])]
    fronts = [
        [found[APPROACHES[0]] for (what, _), found in cells.items() if what == of] for of in BUDGETS
    ]
    return {
        **figures,
        "shared_budgets": len(shared),
        "shared_wins": len(won),
        "front_monotone": all(map(_monotone, fronts)),
    }


def _ours_and_best(found: dict[str, Cell | None]) -> tuple[Cell | None, Cell | None]:
    rivals = [each for approach, each in found.items() if approach != APPROACHES[0] and each]
    return found[APPROACHES[0]], min(rivals, key=lambda c: c.mean, default=None)


def _dominated(found: dict[str, Cell | None]) -> bool:
    ours, best = _ours_and_best(found)
    return best is not None and (ours is None or _spreads(ours, best) > 1)


def _strictly_better(found: dict[str, Cell | None]) -> bool:
    ours, best = _ours_and_best(found)
    return ours is not None and (best is None or ours.mean < best.mean)


def _monotone(front: Sequence[Cell | None]) -> bool:
    """Whether more of a budget is never worse by more than a spread."""
    fitting = [each for each in front if each is not None]
    return all(_spreads(more, less) <= 1 for less, more in itertools.pairwise(fitting))


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


def write(setting: Setting, rows: Sequence[Row], families: Collection[str]) -> None:
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
    margin, budgets = margins(rows, setting), budget_cells(rows, setting)
    shipped = {row["key"]["shipped"]: row for row in rows if "shipped" in row["key"]}
    floor = next((row["fd"] for row in rows if "floor" in row["key"]), None)
    most = {"what": SIZES, "n": max(cost.COUNTS)}
    stored = {
        row["key"]["method"]: row["total"] for row in counted if most.items() <= row["key"].items()
    }
    unseen = shipped.get("unseen")
    quality = shipped.get("quality", {}).get("guidance 2", {})
    summary = {
        "table1_wins": sum(spreads <= 1 for spreads in margin),
        "table1_rows": len(margin),
        "table1_lost_by_two_spreads": sum(spreads > 2 for spreads in margin),
        "fine_vs_scratch_step_ratio": step_ratio(rows, setting),
        "storage_ratio_10_sizes": round(stored[cost.WHOLE] / stored[OURS], 1),
        **budget_summary(rows, setting),
        "zero_shot_loss_gap": unseen and round(unseen["loss"] / unseen["loss_retrained"] - 1, 4),
        "fashion_fd": quality.get("fd"),
        "fashion_fd_floor": floor,
        "fashion_class_accuracy": quality.get("class_accuracy"),
        "sigma_300_steps_seconds": shipped.get("sigma", {}).get("seconds"),
    }
    name = _name(setting)
    commits = {row.get("commit", "") for row in rows if row["key"] not in keys}
    origin = {"commits": sorted(commits)}
    result = {"summary": summary, "setting": repr(setting), "origin": origin, "rows": rows}
    result_file(setting).write_text(json.dumps(result, indent=1) + "\n")
    if margin:
        draw_depths(setting, floor, rows, RESULTS / f"{name}-depth.png")
    if summary["fine_vs_scratch_step_ratio"] is not None:
        draw_steps(setting, floor, rows, RESULTS / f"{name}-steps.png")
    if budgets:
        draw_budgets(budgets, floor, RESULTS / f"{name}-budget.png")


def draw_depths(setting: Setting, floor: float | None, rows: Sequence[Row], file: Path) -> None:
    """FD over depth, a line for each method, with its spread; one picture for each stage."""
    figure, axes = plt.subplots(
        1, len(STAGES), figsize=(13, 4.2), sharey=True, layout="constrained"
    )
    for axis, stage in zip(axes, STAGES, strict=True):
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
        axis.set(
            title=f"after {setting.steps_until(stage):,} steps",
            xlabel="depth",
            yscale="log",
            xticks=setting.depths,
        )
    axes[0].set_ylabel("FD-EffLite0, lower is better")
    axes[-1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, file)


def draw_steps(setting: Setting, floor: float | None, rows: Sequence[Row], file: Path) -> None:
    """FD over the steps after initialisation, one picture for each depth."""
    figure, axes = plt.subplots(
        1, len(setting.depths), figsize=(12, 3.4), sharey=True, layout="constrained", squeeze=False
    )
    s = setting.steps_until("B")
    ends = {stage: setting.steps_until(stage) for stage in STAGES}
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


def draw_budgets(
    budgets: dict[Budget, dict[str, Cell | None]], floor: float | None, file: Path
) -> None:
    """FD over the share of the dense ancestor's memory, and of its latency."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True, layout="constrained")
    for axis, of in zip(axes, BUDGETS, strict=True):
        for approach in APPROACHES:
            points = [
                (share, each)
                for (what, share), found in budgets.items()
                if what == of and (each := found[approach]) is not None
            ]
            ours = approach == APPROACHES[0]
            axis.errorbar(
                [share for share, _ in points],
                [each.mean for _, each in points],
                [each.spread / 2 for _, each in points],
                label=approach,
                linewidth=2.5 if ours else 1.2,
                color="black" if ours else None,
                capsize=2,
            )
        _floor(axis, floor)
        axis.set(xlabel=f"{of}, share of the dense ancestor's", yscale="log")
    axes[0].set_ylabel("FD-EffLite0, lower is better")
    axes[1].legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    _save(figure, file)


def _floor(axis: Any, floor: float | None) -> None:
    if floor is not None:
        axis.axhline(floor, color="grey", linestyle=":", label="real images")


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=110)
    plt.close(figure)
