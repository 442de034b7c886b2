"""`python -m benchmarks.paper [--smoke | --report]`: the tables of PROTOCOL.md."""

import sys

from benchmarks.deployment import REPOSITORY
from benchmarks.paper import budget, report, shipped
from benchmarks.paper.run import make_lab, run_in_processes
from benchmarks.paper.setting import REFERENCE, SMOKE


def main(arguments: list[str]) -> None:
    setting = SMOKE if "--smoke" in arguments else REFERENCE
    work = REPOSITORY / "var" / "paper" / setting.name
    lab = make_lab(setting, work)
    if "--report" not in arguments:
        run_in_processes(setting, work)
        budget.measure(lab)
        if setting == REFERENCE:
            shipped.measure(lab)
    if setting == REFERENCE:
        report.write(setting, lab.ancestors, lab.rows.all(), shipped.version())


if __name__ == "__main__":
    main(sys.argv[1:])
