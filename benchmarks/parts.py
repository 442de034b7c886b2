"""A benchmark of several parts: each is kept as soon as it has ended, and can be run alone."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
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
        started, origin = time.perf_counter(), origin_now()
        parts[part] = measures[part]()
        parts[part] |= {"seconds": round(time.perf_counter() - started), "origin": origin}
        top = {figure: parts[p][figure] for p in summary if p in parts for figure in summary[p]}
        content = {"summary": top, "machine": _machine(), "parts": parts}
        result.write_text(json.dumps(content) + "\n")
    return parts


def origin_now() -> Figures:
    """Where a figure comes from: commit, time, versions, and what else the machine does."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers")}
    return {
        "commit": commit_now(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "load_before": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version(), **versions},
    }


def commit_now() -> str:
    """The commit of this checkout; one with changes beside results and pages ends in "-dirty"."""
    ours = (":!benchmarks/results", ":!docs", ":!README.md")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", *ours)
    return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")


def _git(*words: str) -> str:
    done = subprocess.run(
        ["git", *words], cwd=REPOSITORY, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def _machine() -> Figures:
    import torch

    from learngenes.device import default_device, device_class

    return {
        "device_class": device_class(default_device()),
        "cores": os.cpu_count(),
        "torch": torch.__version__,
    }
