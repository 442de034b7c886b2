"""The paper's comparisons at a scale that shows that they run; the figures mean nothing."""

import dataclasses
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks.paper import budget, cost, report, tables
from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.methods import FINE, METHODS, Choice, first_stage
from benchmarks.paper.rows import OURS, Row, Rows
from benchmarks.paper.run import make_lab, prepare, run
from benchmarks.paper.setting import REFERENCE, SMOKE, load_splits
from benchmarks.paper.training import denoising_loss
from learngenes.config import Kind


def test_every_row_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare(SMOKE, tmp_path)
    rows = run(SMOKE)
    floor, table = rows[0], rows[1:]
    of_table = Counter(row["key"]["table"] for row in table)
    methods, seeds = len({*METHODS, *FINE}), len(SMOKE.seeds)
    assert of_table["depth"] == 3 * len(SMOKE.depths) * methods * seeds
    assert of_table == {"depth": 24, "cost": 1, "sigma": 6, "prefix": 4, "task": 8}
    assert floor["fd"] < min(row["fd"] for row in table)
    assert all(math.isfinite(row["fd"] + row["loss"]) for row in table)
    for table_of_rows in ("depth", "ablations"):
        monkeypatch.setattr(f"benchmarks.paper.{table_of_rows}.later_stage", None)
    assert run(SMOKE) == rows

    lab = make_lab(SMOKE, tmp_path)
    budgets = budget.measure(lab)
    assert [row["key"]["approach"] for row in budgets] == list(budget.APPROACHES) * 2
    assert [row["key"]["of"] for row in budgets[:: len(budget.APPROACHES)]] == ["memory", "latency"]
    fitting = [row for row in budgets if "fd" in row]
    assert all(row[row["key"]["of"]] <= row["budget"] for row in fitting)
    assert {row["key"]["approach"] for row in fitting} == {*budget.APPROACHES}
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    of_another_family: Row = {"key": {"shipped": "unseen", "family": "old"}}
    report.write(SMOKE, [*lab.rows.all(), of_another_family], ["new"])
    summary = json.loads((tmp_path / "paper.json").read_text())["summary"]
    assert [summary[f"{name}_rows"] for name in ("table1", "budget_memory", "budget_latency")] == [
        3,
        1,
        1,
    ]
    assert summary["storage_ratio_10_sizes"] > 1
    assert report.rows_so_far(SMOKE) == [*lab.rows.all(), *cost.totals(SMOKE)]
    assert report.rows_so_far(dataclasses.replace(SMOKE, further_steps=(9, 9))) == []
    for name in ("depth", "cost", "totals", "ablations", "tasks", "budget"):
        lines = getattr(tables, name)(json.loads((tmp_path / "paper.json").read_text()))
        assert len(lines) > 1
        assert {len(line) for line in lines} == {len(lines[0])}
    for name in ("depth", "steps", "budget"):
        with Image.open(tmp_path / f"paper-{name}.png") as picture:
            assert picture.width > 700


def test_what_a_method_begins_with(tmp_path: Path) -> None:
    ancestors = Ancestors(SMOKE, load_splits(SMOKE), tmp_path, tmp_path)
    begun = {name: begin(ancestors, 3) for name, begin in METHODS.items()}
    assert {len(model.layers) for model in begun.values()} == {3}
    dense = ancestors.dense().weights()
    qkv = Kind.QKV
    chosen = begun["weight selection"].weights()
    assert all(torch.equal(a[qkv][0], b[qkv][0]) for a, b in zip(chosen, dense, strict=False))
    for layer in begun["pruning"].weights():
        assert any(torch.equal(layer[qkv][0], other[qkv][0]) for other in dense)
    assert torch.linalg.matrix_rank(begun["svd"].weights()[0][qkv][0]) == SMOKE.svd_rank
    first, middle, last = (layer[qkv][0] for layer in begun["tleg"].weights())
    torch.testing.assert_close(middle, (first + last) / 2)


def test_what_is_random_in_a_method_is_its_own_seeds(tmp_path: Path) -> None:
    ancestors = Ancestors(SMOKE, load_splits(SMOKE), tmp_path, tmp_path)

    def first_layer(method: str, seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        weights = METHODS[method](ancestors, 4).weights()[0]
        return weights[Kind.QKV][0]

    for method, random in (("scratch", True), ("heur-lg", True), ("weight selection", False)):
        assert torch.equal(first_layer(method, 1), first_layer(method, 1))
        assert torch.equal(first_layer(method, 1), first_layer(method, 2)) is not random


def test_a_killed_run_goes_on_with_the_next_row(tmp_path: Path) -> None:
    directory = tmp_path / "rows"
    Rows(directory).get({"a": 1, "b": 2}, lambda: {"fd": 3.0})
    again = Rows(directory)
    assert again.has({"b": 2, "a": 1})
    assert again.get({"a": 1, "b": 2}, lambda: pytest.fail("measured twice"))["fd"] == 3.0


def test_a_learning_rate_that_diverges_is_not_chosen(tmp_path: Path) -> None:
    lab = make_lab(SMOKE, tmp_path)

    def loss(rate: float) -> float:
        choice = Choice(rate, rate, 0.0)
        model = first_stage(lab.ancestors, "scratch", SMOKE.searched_depth, 0, choice)
        return denoising_loss(model, lab.ancestors.splits.choosing, SMOKE)

    outcomes = [lab.outcome({"rate": rate}, lambda r=rate: loss(r)) for rate in (1e30, 1e-3)]
    assert outcomes[0] == math.inf
    assert math.isfinite(outcomes[1])
    assert any("at step 1" in row.get("diverged", "") for row in lab.rows.all())


def test_best_or_within_one_spread_of_best_is_a_win() -> None:
    setting = dataclasses.replace(SMOKE, depths=(4,))

    def rows(method: str, *fds: float) -> list[Row]:
        key = {"table": "depth", "method": method, "depth": 4}
        return [
            {"key": {**key, "stage": stage, "seed": seed}, "fd": fd}
            for stage in "ABC"
            for seed, fd in enumerate(fds)
        ]

    others = [r for m in (*METHODS, *FINE) if m != OURS for r in rows(m, 99.0, 101.0)]
    for ours, spreads in (((99.0, 99.0), 0), ((101.0, 103.0), 1), ((104.0, 104.0), 2)):
        assert report.margins([*others, *rows(OURS, *ours)], setting) == [spreads] * 3
    assert report.margins(others, setting) == []


def test_several_models_of_a_family_cost_less_the_more_there_are() -> None:
    def ratio(what: str, n: int, others: str) -> float:
        found = {
            row["key"]["method"]: row["total"]
            for row in cost.totals(REFERENCE)
            if (row["key"]["what"], row["key"]["n"]) == (what, n)
        }
        return float(found[others] / found[OURS])

    for what, others in (
        (cost.SIZES, cost.WHOLE),
        (cost.TASKS, cost.WHOLE),
        (cost.LAYER_STEPS, "scratch, 10 s"),
    ):
        ratios = [ratio(what, n, others) for n in cost.COUNTS]
        assert ratios == sorted(ratios)
        assert ratios[-1] > 1
    assert cost.spread_depths(12, 10) == [*range(12, 2, -1)]


def test_how_many_times_the_steps_scratch_needs() -> None:
    setting = dataclasses.replace(SMOKE, depths=(4, 6), scratch_multiples=(1, 2, 3))
    rows: list[Row] = []
    for depth, ours in ((4, 70.0), (6, 90.0)):
        key = {"method": OURS, "stage": "B", "seed": 0, "depth": depth}
        rows.append({"key": {"table": "depth", **key}, "fd": ours})
        for multiple, fd in ((1, 110.0), (2, 95.0), (3, 80.0)):
            rows.append({"key": {"table": "cost", "depth": depth, "multiple": multiple}, "fd": fd})
    assert report.step_ratio(rows, setting) == 2
    assert report.step_ratio(rows[:-1], setting) is None
