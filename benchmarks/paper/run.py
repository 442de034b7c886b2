"""All rows of all tables, one process for each core; goes on where the last run stopped."""

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.paper.ancestors import FORMS, Ancestors
from benchmarks.paper.depth import DepthTable
from benchmarks.paper.judge import Judge
from benchmarks.paper.methods import FINE, METHODS
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.setting import Setting, load_splits

Map = Callable[..., Iterable[Any]]
_table: DepthTable


def run(setting: Setting, apply: Map = map) -> list[Row]:
    """All rows. `apply` is `map` after `prepare`, or that of processes that began with it."""
    methods = (*METHODS, *FINE)
    _all("ancestors", apply, _ancestor, ["dense", "tleg", *FORMS])
    (floor,) = _all("floor", apply, _floor, [0])
    _all("learning rates", apply, _learning_rates, methods)
    cases = [*itertools.product(setting.seeds, setting.depths, methods)]
    rows = _all("rows", apply, _measure, cases)
    return [floor, *itertools.chain(*rows)]


def prepare(setting: Setting, work: Path) -> None:
    """What is measured, in this process; what was measured before is read from `work`."""
    global _table  # noqa: PLW0603  # how processes of a pool are told
    torch.set_num_threads(1)
    splits = load_splits(setting)
    ancestors = Ancestors(setting, splits, work)
    _table = DepthTable(ancestors, Judge(setting, splits), Rows(work / "rows"))


def _all(what: str, apply: Map, work: Callable[..., Any], cases: Sequence[Any]) -> list[Any]:
    return list(tqdm(apply(work, cases), desc=what, total=len(cases), unit=""))


def _ancestor(name: str) -> None:
    ancestors = _table.ancestors
    {"dense": ancestors.dense, "tleg": ancestors.tleg}.get(name, lambda: ancestors.fine(name))()


def _floor(_: int) -> Row:
    return _table.rows.get({"floor": "fd"}, lambda: {"fd": _table.judge.floor()})


def _learning_rates(method: str) -> tuple[float, float]:
    return _table.learning_rates(method)


def _measure(case: tuple[int, int, str]) -> list[Row]:
    seed, depth, method = case
    return _table.measure(method, depth, seed)


def run_in_processes(setting: Setting, work: Path) -> list[Row]:
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer=prepare, initargs=(setting, work)
    ) as pool:
        return run(setting, pool.map)
