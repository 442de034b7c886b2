"""A benchmark of several parts: each is kept as soon as it has ended, and can be run alone."""

import json
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
RESULTS = REPOSITORY / "benchmarks" / "results"
Figures = dict[str, Any]
Table = list[tuple[str, ...]]
"""Heading, then rows."""


def rows(text: str) -> Table:
    """Rows of a table: a line each, its cells apart by "|"; spaces in a row count as one."""
    return [tuple(" ".join(cell.split()) for cell in line.split("|")) for line in text.splitlines()]


def say(what: str, **figures: object) -> None:
    """A line of progress."""
    print(" ", what, *(f"{name} {value}" for name, value in figures.items()), flush=True)


def run(
    name: str,
    measures: Mapping[str, Callable[[], Figures]],
    summary: Mapping[str, Sequence[str]],
) -> Figures:
    """Measure the parts that the command line names, or all; gives every part's figures.

    `summary` names, by part, the figures that stand at the top of benchmarks/results/NAME.json.
    """
    wanted = sys.argv[1:] or list(measures)
    if unknown := set(wanted) - set(measures):
        sys.exit(f"no part {', '.join(unknown)}; choose of {', '.join(measures)}")
    result = RESULTS / f"{name}.json"
    parts: Figures = json.loads(result.read_text())["parts"] if result.exists() else {}
    for part in wanted:
        print(part, flush=True)
        started = time.perf_counter()
        parts[part] = measures[part]()
        parts[part]["seconds"] = round(time.perf_counter() - started)
        top = {figure: parts[p][figure] for p in summary if p in parts for figure in summary[p]}
        content = {"summary": top, "machine": _machine(), "parts": parts}
        result.write_text(json.dumps(content) + "\n")
    return parts


def _machine() -> Figures:
    import torch

    from learngenes.device import default_device, device_class

    return {
        "device_class": device_class(default_device()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
