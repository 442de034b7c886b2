"""Every part of every benchmark whose figures are older than the code: `make bench`.

Each is a process of its own, for an hour at most; a part that ended is not measured again, so
that another run goes on. In the end it says what is left out, and why.
"""

import importlib
import json
import signal
import subprocess
import sys
import time

from benchmarks.docs import stale
from benchmarks.freshness import PATHS
from benchmarks.parts import REPOSITORY, RESULTS, say

MOST_SECONDS = 3600.0
WHOLE = ("main_job", "paper")
"""Benchmarks that are no list of parts."""
ELSEWHERE = ("gpu",)
"""What is measured on a machine of its own."""


def wanted() -> list[tuple[str, str]]:
    """(benchmark, part) of what is to be measured, in the order of their names."""
    old, found = stale(), []
    for name in (name for name in PATHS if name not in ELSEWHERE):
        file = RESULTS / f"{name}.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        if name in WHOLE:
            found += [(name, "")] if not known or name in old else []
            continue
        parts = importlib.import_module(f"benchmarks.{name}.__main__").PARTS
        there = known.get("parts", {})
        found += [(name, part) for part in parts if part not in there or part in old.get(name, [])]
    return found


def main() -> None:
    left_out = {}
    for name, part in wanted():
        command = [sys.executable, "-m", f"benchmarks.{name}", *([part] if part else [])]
        began = time.monotonic()
        with subprocess.Popen(command, cwd=REPOSITORY) as measuring:
            try:
                if status := measuring.wait(MOST_SECONDS):
                    left_out[f"{name} {part}"] = f"ended with status {status}"
            except subprocess.TimeoutExpired:
                left_out[f"{name} {part}"] = f"took more than {MOST_SECONDS / 60:.0f} minutes"
                measuring.send_signal(signal.SIGINT)  # it stops what it has started
        say(f"{name} {part}", seconds=round(time.monotonic() - began))
    for what, why in left_out.items():
        say(f"left out: {what}, which {why}")
    sys.exit(bool(left_out))


if __name__ == "__main__":
    main()
