"""Write the figures of README.md and docs/ from benchmarks/results: `python -m benchmarks.docs`.

With `--check` it writes nothing, and fails where a page shows other figures than there are, or
figures of other code than there is: `make figures-check`.
"""

import json
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import summary
from benchmarks.elastic import report as elastic
from benchmarks.form import report as form
from benchmarks.freshness import stale_parts
from benchmarks.interop import report as interop
from benchmarks.main_job import report as main_job
from benchmarks.operate import report as operate
from benchmarks.paper import tables as paper
from benchmarks.parts import REPOSITORY, RESULTS, Table
from benchmarks.sampling import report as sampling
from benchmarks.scale import report as scale
from benchmarks.serving import report as serving
from benchmarks.sizing import report as sizing
from benchmarks.start import report as start
from benchmarks.training import report as training
from benchmarks.trust import report as trust

PAGES = [
    REPOSITORY / page
    for page in (
        "README.md",
        "docs/results.md",
        "docs/paper.md",
        "docs/scale.md",
        "docs/elastic.md",
    )
]
BLOCK = re.compile(r"(<!-- (\w+) -->\n).*?(<!-- /\2 -->)", re.DOTALL)
MARK = "\n*Older than the code that is measured: {}.*\n"
TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Table]]] = {
    "main_job": ("main_job", main_job.main_job),
    "sizing": ("sizing", sizing.sizing),
    "dit_xl": ("sizing", sizing.dit_xl),
    "budgets": ("sizing", sizing.budgets),
    "serving": ("serving", serving.serving),
    "serving_aims": ("serving", serving.serving_aims),
    "start": ("start", start.start),
    "training": ("training", training.training),
    "form": ("form", form.form),
    "healing": ("healing", form.healing),
    "importing": ("importing", form.importing),
    "elastic_crowd": ("elastic", elastic.crowd),
    "elastic_promises": ("elastic", elastic.promises),
    "operate": ("operate", operate.operate),
    "interop": ("interop", interop.interop),
    "sampling": ("sampling", sampling.sampling),
    "scale": ("scale", scale.measured),
    "scale_simulated": ("scale", scale.simulated),
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


def blocks() -> dict[str, str]:
    """Markdown of every block that a page can name in its comments."""
    results = {path.stem: json.loads(path.read_text()) for path in RESULTS.glob("*.json")}
    tables = {name: _markdown(table(results[result])) for name, (result, table) in TABLES.items()}
    return {
        **tables,
        "summary": _markdown(summary.summary(results)),
        "answer": summary.answer(results["main_job"]),
    }


def marked(made: Mapping[str, str], old: Mapping[str, list[str]]) -> dict[str, str]:
    """The same blocks, with a line under each table of a result that has `old` parts."""
    told = dict(made)
    for name, (result, _) in TABLES.items():
        if parts := old.get(result):
            told[name] += MARK.format(", ".join(parts))
    if old:
        told["summary"] += MARK.format(", ".join(old))
    return told


def stale() -> dict[str, list[str]]:
    """By result: its parts that are older than the code that they measure."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}
    found = {name: stale_parts(name, result) for name, result in results.items()}
    return {name: parts for name, parts in found.items() if parts}


def render(page: str, made: Mapping[str, str]) -> str:
    """The page with every block made anew. Raises KeyError when there is none of that name."""
    return BLOCK.sub(lambda match: match[1] + made[match[2]] + match[3], page)


def _markdown(table: Table) -> str:
    lines = [table[0], ("---",) * len(table[0]), *table[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    old = stale()
    made = marked(blocks(), old)
    pages = {page: render(page.read_text(), made) for page in PAGES}
    if "--check" not in sys.argv:
        for page, content in pages.items():
            page.write_text(content)
        return
    for name, parts in old.items():
        print(f"{name}: older than the code that is measured: {', '.join(parts)}")
    other = [page.name for page, content in pages.items() if content != page.read_text()]
    for name in other:
        print(f"{name}: not what `python -m benchmarks.docs` makes")
    sys.exit(bool(old or other))


if __name__ == "__main__":
    main()
