"""What the README shows of benchmarks/results: an answer, and a line for each main figure."""

import json
from typing import Any, NamedTuple

from benchmarks.parts import Table

Result = dict[str, Any]


class Line(NamedTuple):
    what: str
    measured: str
    command: str
    aim: str = ""
    met: bool = True

    def cells(self) -> tuple[str, ...]:
        measured = self.measured if self.met else f"**{self.measured}**, missed"
        return self.what, self.aim, measured, f"`make {self.command}`"


def summary(results: dict[str, Result]) -> Table:
    lines = [
        *_main_job(results["main_job"]),
        *_sizing(results["sizing"]),
        *_serving(results["serving"]),
        _kills(results["trust"]),
        _paper(results["paper"]),
        _condensation(results["interop"]),
    ]
    return [("", "aim", "measured", "by"), *(line.cells() for line in lines)]


def answer(main_job: Result) -> str:
    """The record of the main job's model, `ready`, without what was not kept of it."""
    figures = main_job["figures"]
    depth, rank, mode = figures["sizes"][-1].split()
    size = {"depth": int(depth[1:]), "rank": int(rank[1:]), "mode": mode}
    predicted, measured = (_shown(figures[which]) for which in ("predicted", "measured"))
    lines = (
        '{"id": "m-…", "status": "ready",',
        f' "plan": {{{json.dumps(size)[1:-1]}, "…": "…",',
        f'          "predicted": {predicted}}},',
        f' "measured": {measured}, "…": "…"}}',
    )
    return "\n".join(("```json", *lines, "```", ""))


def _shown(cost: Result) -> str:
    names = ("memory_bytes", "latency_p95_seconds")
    return json.dumps({name: round(cost[name], 3) for name in names})


def _main_job(result: Result) -> list[Line]:
    s, command = result["summary"], "bench-main-job"
    seconds = f"{s['first_image_seconds']:.1f} · {s['ready_seconds']:.0f} s"
    found = f"{s['class_accuracy']:.1%} ({result['figures']['class_accuracy_real_test_set']:.1%})"
    return [
        Line("`make up` to ready, from a fresh clone", f"{s['up_seconds']:.0f} s", command),
        Line("budget to the first image · to `ready`", seconds, command),
        Line("a classifier finds the class asked for (in real images)", found, command),
    ]


def _sizing(result: Result) -> list[Line]:
    s, command = result["summary"], "bench-sizing"
    median, worst = s["memory_error_median"], s["memory_error_max"]
    within = s["latency_within_budget_share"]
    return [
        Line(
            "memory, predicted beside measured: median (worst) error",
            f"{median:.2%} ({worst:.2%})",
            command,
            "≤ 2% (≤ 5%)",
            median <= 0.02 and worst <= 0.05,
        ),
        Line("latency budgets kept", f"{within:.1%}", command, "≥ 95%", within >= 0.95),
    ]


def _serving(result: Result) -> list[Line]:
    s, command = result["summary"], "bench-serving"
    resident = result["parts"]["density"]["resident_bytes"]
    ours, theirs = (resident[way]["100"] / 1e6 for way in ("engine", "pipelines"))
    one, many = s["speedup_16_clients"], s["speedup_mix20_vs_best_peer"]
    peak = s["gemm_peak_share"]
    return [
        Line(
            "images a second over plain diffusers in float32, 16 clients",
            f"{one:.2f} times",
            command,
            "≥ 4 times",
            one >= 4,
        ),
        Line(
            "20 models at once, over the best other server",
            f"{many:.2f} times",
            command,
            "≥ 2 times",
            many >= 2,
        ),
        Line(
            "share of the GEMM peak in a full batch", f"{peak:.0%}", command, "≥ 60%", peak >= 0.6
        ),
        Line("100 models in memory · as pipelines", f"{ours:.0f} · {theirs:.0f} MB", command),
    ]


def _kills(result: Result) -> Line:
    s = result["summary"]
    counts = [s[what] for what in ("lost", "duplicated", "corrupt")]
    return Line(
        f"{s['kills']} kills under load: of {s['accepted']:,} accepted, lost · twice · corrupt",
        " · ".join(str(count) for count in counts),
        "bench-trust",
        "0 · 0 · 0",
        not any(counts),
    )


def _paper(result: Result) -> Line:
    wins, cells = result["summary"]["table1_wins"], result["summary"]["table1_rows"]
    return Line(
        "the paper's comparison at equal cost: FINE is the best in",
        f"{wins} of {cells} cells",
        "paper",
        "most",
        2 * wins > cells,
    )


def _condensation(result: Result) -> Line:
    s = result["summary"]
    ours, pruned = s["condense_half_depth_fd"], s["prune_half_depth_fd"]
    return Line(
        "a DiT condensed to half its depth: FD (pruned)",
        f"{ours:.0f} ({pruned:.0f})",
        "bench-interop",
        "≤ pruned",
        ours <= pruned,
    )
