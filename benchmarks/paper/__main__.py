"""`python -m benchmarks.paper [--smoke]`: every table; goes on where the last run stopped."""

import sys
from pathlib import Path

from benchmarks.deployment import REPOSITORY
from benchmarks.paper import depth
from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.setting import REFERENCE, SMOKE, Setting, load_splits


def run(setting: Setting, work: Path) -> list[Row]:
    """All rows; what was measured before is read from `work`."""
    work.mkdir(parents=True, exist_ok=True)
    splits = load_splits(setting)
    ancestors, judge = Ancestors(setting, splits, work), Judge(setting, splits)
    floor = Rows(work / "floor.jsonl").get({"floor": "fd"}, lambda: {"fd": judge.floor()})
    return [floor, *depth.measure(ancestors, judge, work)]


if __name__ == "__main__":
    chosen = SMOKE if "--smoke" in sys.argv[1:] else REFERENCE
    run(chosen, REPOSITORY / "var" / "paper" / chosen.name)
