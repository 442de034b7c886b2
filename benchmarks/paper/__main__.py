"""`python -m benchmarks.paper [--smoke]`: the tables of PROTOCOL.md."""

import sys

from benchmarks.deployment import REPOSITORY
from benchmarks.paper import report, sigma
from benchmarks.paper.run import run_in_processes
from benchmarks.paper.setting import REFERENCE, SMOKE

if __name__ == "__main__":
    if "--smoke" in sys.argv[1:]:
        run_in_processes(SMOKE, REPOSITORY / "var" / "paper" / SMOKE.name)
    else:
        work = REPOSITORY / "var" / "paper" / REFERENCE.name
        seconds = sigma.measure(work)
        floor, *table = run_in_processes(REFERENCE, work)
        report.write(REFERENCE, work, floor, table, seconds)
