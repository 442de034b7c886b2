"""Write the README's tables of figures from benchmarks/results; every benchmark calls it."""

import json
import re
from collections.abc import Callable
from typing import Any

from benchmarks.interop import report as interop
from benchmarks.main_job import report as main_job
from benchmarks.operate import report as operate
from benchmarks.paper import tables as paper
from benchmarks.parts import REPOSITORY, RESULTS, Table
from benchmarks.serving import report as serving
from benchmarks.sizing import report as sizing
from benchmarks.trust import report as trust

README = REPOSITORY / "README.md"
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Table]]] = {
    "main_job": ("main_job", main_job.main_job),
    "sizing": ("sizing", sizing.sizing),
    "dit_xl": ("sizing", sizing.dit_xl),
    "budgets": ("sizing", sizing.budgets),
    "serving": ("serving", serving.serving),
    "serving_aims": ("serving", serving.serving_aims),
    "operate": ("operate", operate.operate),
    "interop": ("interop", interop.interop),
    "trust_faults": ("trust", trust.faults),
    "trust_endurance": ("trust", trust.endurance),
    "paper_depth": ("paper", paper.depth),
    "paper_cost": ("paper", paper.cost),
    "paper_totals": ("paper", paper.totals),
    "paper_ablations": ("paper", paper.ablations),
    "paper_tasks": ("paper", paper.tasks),
    "paper_budget": ("paper", paper.budget),
    "paper_shipped": ("paper", paper.shipped),
    "paper_emoji": ("paper", paper.emoji),
}
"""Name of a table to the result that it is made from, and how."""


def render(readme: str) -> str:
    """The README with every table made anew."""
    for name, (result, table) in TABLES.items():
        path = RESULTS / f"{result}.json"
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if path.exists():
            made = _markdown(table(json.loads(path.read_text())))
            readme = pattern.sub(lambda match, made=made: match[1] + made + match[2], readme)
    return readme


def _markdown(table: Table) -> str:
    lines = [table[0], ("---",) * len(table[0]), *table[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
