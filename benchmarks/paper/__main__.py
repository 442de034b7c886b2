"""`python -m benchmarks.paper [--smoke | --report]`: the tables of PROTOCOL.md."""

import sys

from benchmarks.paper import budget, emoji, report, shipped
from benchmarks.paper.rows import version
from benchmarks.paper.run import make_lab, run_in_processes
from benchmarks.paper.setting import REFERENCE, SMOKE
from benchmarks.parts import REPOSITORY
from learngenes.family.family import load_family


def main(arguments: list[str]) -> None:
    setting = SMOKE if "--smoke" in arguments else REFERENCE
    work = REPOSITORY / "var" / "paper" / setting.name
    lab = make_lab(setting, work)
    measured = "--report" not in arguments
    if measured:
        run_in_processes(setting, work)
        budget.measure(lab)
    if setting == REFERENCE:
        fashion, of_emoji = (load_family(REPOSITORY / "families" / n) for n in ("fashion", "emoji"))
        if measured:
            shipped.measure(lab, fashion)
            emoji.measure(lab.rows, of_emoji, emoji.load_styles(of_emoji))
        report.write(setting, lab.ancestors, lab.rows.all(), {version(fashion), version(of_emoji)})


if __name__ == "__main__":
    main(sys.argv[1:])
