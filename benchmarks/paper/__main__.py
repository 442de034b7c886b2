"""`python -m benchmarks.paper [--smoke | --digits] [--report]`: the tables of PROTOCOL.md."""

import sys

from benchmarks.paper import budget, emoji, report, shipped
from benchmarks.paper.rows import version
from benchmarks.paper.run import make_lab, run_in_processes
from benchmarks.paper.setting import ON_DIGITS, REFERENCE, SMOKE
from benchmarks.parts import REPOSITORY
from learngenes.family.family import load_family

SETTINGS = {"--smoke": SMOKE, "--digits": ON_DIGITS}


def main(arguments: list[str]) -> None:
    setting = next((SETTINGS[each] for each in arguments if each in SETTINGS), REFERENCE)
    work = REPOSITORY / "var" / "paper" / setting.name
    lab = make_lab(setting, work)
    measured = "--report" not in arguments
    if measured:
        run_in_processes(setting, work)
        budget.measure(lab)
    if setting == SMOKE:
        return
    fashion, of_emoji = (load_family(REPOSITORY / "families" / n) for n in ("fashion", "emoji"))
    if measured and setting == REFERENCE:
        shipped.measure(lab, fashion)
        emoji.measure(lab.rows, of_emoji, emoji.load_styles(of_emoji))
    report.write(setting, lab.rows.all(), {version(fashion), version(of_emoji)})


if __name__ == "__main__":
    main(sys.argv[1:])
