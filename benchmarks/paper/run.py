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

from benchmarks.paper import ablations, cost, depth, report, tasks
from benchmarks.paper.ancestors import FORMS, Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import FINE, METHODS
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.setting import REFERENCE, Setting, load_splits

Map = Callable[..., Iterable[Any]]
TABLES = {"depth": depth, "cost": cost, "ablations": ablations, "tasks": tasks}
_lab: Lab


def run(setting: Setting, apply: Map = map) -> list[Row]:
    """All rows. `apply` is `map` after `prepare`, or that of processes that began with it."""
    judges = ["judge", *(tasks.TASKS if "tasks" in setting.tables else ())]
    _all("ancestors", apply, _prepare, [*reversed(FORMS), "dense", "tleg", *judges])
    (floor,) = _all("floor", apply, _floor, [0])
    searches = [("depth", method) for method in (*reversed(FINE), *METHODS)]
    if "tasks" in setting.tables:
        searches += [("tasks", method) for method in tasks.METHODS]
    _all("learning rates", apply, _search, searches)
    cases = [(name, case) for name in setting.tables for case in TABLES[name].cases(setting)]
    return [floor, *itertools.chain(*_all("rows", apply, _measure, cases))]


def prepare(setting: Setting, work: Path) -> None:
    """What is measured, in this process; what was measured before is read from `work`."""
    global _lab  # noqa: PLW0603  # how processes of a pool are told
    torch.set_num_threads(1)
    _lab = make_lab(setting, work)


def make_lab(setting: Setting, work: Path) -> Lab:
    """The reference's ancestors and the rows measured so far are part of the repository."""
    splits = load_splits(setting)
    work.mkdir(parents=True, exist_ok=True)
    judge = Judge(setting, splits, work)
    kept, earlier = work, []
    if setting == REFERENCE:
        kept = Path(__file__).parent / "trained"
        kept.mkdir(exist_ok=True)
        earlier = report.rows_so_far(setting)
    return Lab(Ancestors(setting, splits, kept, work), judge, Rows(work / "rows", earlier))


def _all(what: str, apply: Map, work: Callable[..., Any], cases: Sequence[Any]) -> list[Any]:
    return list(tqdm(apply(work, cases), desc=what, total=len(cases), unit=""))


def _prepare(what: str) -> None:
    ancestors = _lab.ancestors
    if what in FORMS:
        ancestors.fine(what)
    elif what in tasks.TASKS:
        tasks.judge_of(_lab, what).prepare()
    else:
        {"dense": ancestors.dense, "tleg": ancestors.tleg, "judge": _lab.judge.prepare}[what]()


def _floor(_: int) -> Row:
    return _lab.rows.get({"floor": "fd"}, lambda: {"fd": _lab.judge.floor()})


def _search(case: tuple[str, str]) -> None:
    table, method = case
    {"depth": depth.choices, "tasks": tasks.learning_rate}[table](_lab, method)


def _measure(case: tuple[str, tuple[Any, ...]]) -> list[Row]:
    name, values = case
    rows: list[Row] = TABLES[name].measure(_lab, *values)
    return rows


def run_in_processes(setting: Setting, work: Path) -> list[Row]:
    with ProcessPoolExecutor(
        os.cpu_count(), get_context("spawn"), initializer=prepare, initargs=(setting, work)
    ) as pool:
        return run(setting, pool.map)
