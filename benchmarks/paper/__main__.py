"""`python -m benchmarks.paper [--smoke]`: the tables of PROTOCOL.md."""

import sys

from benchmarks.deployment import REPOSITORY
from benchmarks.paper.run import run_in_processes
from benchmarks.paper.setting import REFERENCE, SMOKE

if __name__ == "__main__":
    setting = SMOKE if "--smoke" in sys.argv[1:] else REFERENCE
    run_in_processes(setting, REPOSITORY / "var" / "paper" / setting.name)
