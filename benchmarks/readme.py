"""Write the README's tables of figures from benchmarks/results; every benchmark calls it."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.interop import report as interop
from benchmarks.paper import tables
from benchmarks.trust import report as trust

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
RESULTS = REPOSITORY / "benchmarks" / "results"
Rows = list[tuple[str, ...]]
POISSON = ("poisson_low", "poisson_high")


def main_job(result: dict[str, Any]) -> Rows:
    s, f = result["summary"], result["figures"]
    tests = "not finished"
    if s["test_seconds"] is not None:
        tests = f"{s['test_seconds']} s, {s['coverage']:.0f} % coverage"
    return [
        ("", ""),
        ("`make up` to ready, cold virtual environment", f"{s['up_seconds']:.0f} s"),
        ("POST to the first image (revision 0)", f"{s['first_image_seconds']:.1f} s"),
        ("POST to `ready` (Σ retrained and measured)", f"{s['ready_seconds']:.0f} s"),
        (
            "requested class found by a classifier in 1,000 samples "
            f"(real test set: {f['class_accuracy_real_test_set']:.1%})",
            f"{s['class_accuracy']:.1%}",
        ),
        ("largest difference from diffusers' DiT", f"{s['diffusers_max_abs_diff']:.1e}"),
        (
            "one request over HTTP / plain diffusers, same images",
            f"{f['request_seconds_over_plain_diffusers']:.2f} times",
        ),
        (
            "`ready` again after SIGKILL to the build worker",
            f"{f['ready_after_kill_seconds']:.0f} s",
        ),
        ("`make test`", tests),
    ]


def sizing(result: dict[str, Any]) -> Rows:
    s, parts = result["summary"], result["parts"]
    cap, noise = parts["kernel_cap"], parts["cases"]["machine_noise"]
    return [
        ("", "aim", "measured"),
        (
            "memory, predicted beside measured: median (worst) error",
            "≤ 2 % (≤ 5 %)",
            f"{s['memory_error_median']:.2%} ({s['memory_error_max']:.2%})",
        ),
        (f"of {s['cases']} random budgets, over in memory", "0", str(s["over_budget"])),
        (
            "latency, predicted beside measured: median error",
            "≤ 10 %",
            f"{s['latency_error_median']:.1%}",
        ),
        (
            "95th percentile within the latency budget",
            "≥ 95 %",
            f"{s['latency_within_budget_share']:.1%} of {parts['cases']['latency_budgets']}",
        ),
        (
            f"the machine: {noise['what']}, median distance from their median",
            "",
            f"{noise['error_median']:.1%}",
        ),
        (
            "process budgets: runs under a kernel limit of the budget · 10 % less is refused",
            "5 · 5",
            f"{cap['ran_at_the_budget']} · {cap['refused_by_the_plan_at_nine_tenths']}",
        ),
        (
            "solve, 99th percentile of 10,000",
            "≤ 5 ms",
            f"{s['solve_p99_seconds'] * 1e3:.1f} ms",
        ),
        (
            "`POST /plan` at 50 a second, 99th percentile",
            "≤ 20 ms",
            f"{s['plan_http_p99_seconds'] * 1e3:.1f} ms",
        ),
        ("better sizes found by brute force in 10,000", "0", str(s["bruteforce_beaten"])),
    ]


def dit_xl(result: dict[str, Any]) -> Rows:
    part = result["parts"]["dit_xl"]
    dense = part["ways"]["dense bfloat16"]
    rows: Rows = [
        ("depth 28", "weights, MB", "peak, MB", "process, MB", "seconds / dense bfloat16")
    ]
    least = part["least_budget_of_full_depth"]
    name = f"least budget: {least['size'].removeprefix('L28 ')}"
    for way, figures in (*part["ways"].items(), (name, least)):
        rows.append(
            (
                way,
                f"{figures['weight_bytes'] / 1e6:.1f}",
                f"{figures['measured_bytes'] / 1e6:.1f}",
                f"{figures['measured_process_bytes'] / 1e6:.0f}",
                f"{figures['measured_seconds'] / dense['measured_seconds']:.2f}",
            )
        )
    return rows


def budgets(result: dict[str, Any]) -> Rows:
    rows: Rows = [
        ("`max_mem_gb`", "`max_latency_ms`", "the plan", "quality", "predicted, MB", "measured, MB")
    ]
    for row in result["parts"]["dit_xl"]["budgets"]:
        rows.append(
            (
                f"{row['max_mem_gb']:g}",
                f"{row['max_latency_ms'] or ''}",
                row["size"],
                f"{row['quality']:.4f}",
                f"{row['predicted_bytes'] / 1e6:.1f}",
                f"{row['measured_bytes'] / 1e6:.1f}",
            )
        )
    return rows


def serving(result: dict[str, Any]) -> Rows:
    rows: Rows = [
        (
            "25 steps, guided",
            "1 client",
            "4 clients",
            "16 clients",
            "p95, 16 clients",
            "20 models, 16 clients",
            "p95",
            "p95 at few · many arrivals",
        )
    ]
    for name, loads in result["parts"]["throughput"]["servers"].items():
        one, mix = loads["one"], loads["mix20"]
        rows.append(
            (
                name,
                *(
                    f"{one[f'{clients}_clients']['images_per_second']:.1f}"
                    for clients in (1, 4, 16)
                ),
                f"{one['16_clients']['latency_p95']:.2f} s",
                f"{mix['16_clients']['images_per_second']:.1f}",
                f"{mix['16_clients']['latency_p95']:.2f} s",
                " · ".join(f"{mix[load]['latency_p95']:.2f} s" for load in POISSON),
            )
        )
    return rows


def serving_aims(result: dict[str, Any]) -> Rows:
    s, parts = result["summary"], result["parts"]
    throughput, density = parts["throughput"], parts["density"]
    wide = parts["roofline"]["of"]["wide bfloat16"]["gemm_peak_share"]
    resident = density["resident_bytes"]
    megabytes = {side: {n: b / 1e6 for n, b in held.items()} for side, held in resident.items()}

    def times(aim: str, value: float) -> tuple[str, str]:
        return f"≥ {aim} times", f"{value:.2f} times"

    def held(count: str) -> str:
        return f"{megabytes['engine'][count]:.0f} · {megabytes['pipelines'][count]:.0f} MB"

    return [
        ("", "aim", "measured"),
        ("images/s over plain float32, 1 client", *times("1.5", s["speedup_1_client"])),
        ("… 16 clients", *times("4", s["speedup_16_clients"])),
        ("… at its best dtype, 1 client", *times("1.3", s["speedup_1_client_best_dtype"])),
        ("… at its best dtype, 16 clients", *times("2.5", s["speedup_16_clients_best_dtype"])),
        (
            "20 models over the best of all others, 16 clients",
            *times("2", s["speedup_mix20_vs_best_peer"]),
        ),
        (
            "p95 over another server's, the worst of all loads "
            f"({throughput['p95_ratio_worst_where']})",
            "≤ 1",
            f"{s['p95_ratio_worst']:.2f}",
        ),
        (
            "share of the GEMM peak in a full batch, width 128",
            "≥ 60 %",
            f"{s['gemm_peak_share']:.0%}",
        ),
        ("… width 384, as DiT-S/2", "≥ 60 %", f"{wide:.0%}"),
        *(
            (f"resident, number of models {count}: here · as pipelines", "", held(count))
            for count in resident["engine"]
        ),
        (
            "100 models mixed, over one model's images/s",
            "≥ 85 %",
            f"{s['mix100_throughput_ratio']:.0%}",
        ),
        (
            f"of {parts['correctness']['requests']:,} random mixed requests, unlike their solo run",
            "0",
            str(s["solo_vs_batch_mismatches"]),
        ),
        (
            "HTTP and queue, over bare sampling: p50 · p95",
            "≤ 10 · 25 ms",
            f"{s['overhead_p50_seconds'] * 1e3:.1f} · {s['overhead_p95_seconds'] * 1e3:.1f} ms",
        ),
        (
            "10 steps behind ten requests of 200 steps · alone",
            "",
            f"{throughput['short_behind_long_seconds']:.2f} · "
            f"{throughput['short_alone_seconds']:.2f} s",
        ),
    ]


def operate(result: dict[str, Any]) -> Rows:
    s, parts = result["summary"], result["parts"]
    composed, stranger, suites = parts["compose"], parts["stranger"], parts["suites"]
    return [
        ("", ""),
        (
            "images: service · worker",
            f"{s['service_image_bytes'] / 1e6:.0f} · {s['worker_image_bytes'] / 1e6:.0f} MB",
        ),
        ("… built, on base images made of Debian's packages", f"{composed['build_seconds']:.0f} s"),
        (
            "compose: up to ready · a model ready · its images",
            f"{composed['up_seconds']:.0f} · {composed['ready_model_seconds']:.0f} · "
            f"{composed['images_seconds']:.1f} s",
        ),
        ("left out there, since it cannot be had here", ", ".join(composed["left_out"])),
        (
            "dashboards: panels with data · queries with data",
            f"{s['panels_with_data']} of {s['panels']} · "
            f"{suites['queries_with_data']} of {suites['queries']}",
        ),
        (
            "the page: first paint · plan shown",
            f"{stranger['page_first_paint_seconds']:.2f} · {s['page_interactive_seconds']:.2f} s",
        ),
        ("… serious accessibility violations", str(s["axe_serious"])),
        (
            "hosts that `fineserve doctor` sees through",
            f"{s['doctor_cases_ok']} of {suites['doctor_cases']}",
        ),
        (
            "fresh clone: `make up`, deploy by slider, images, `make down`",
            f"{s['stranger_seconds']:.0f} s",
        ),
    ]


TABLES: dict[str, tuple[str, Callable[[dict[str, Any]], Rows]]] = {
    "main_job": ("main_job", main_job),
    "sizing": ("sizing", sizing),
    "dit_xl": ("sizing", dit_xl),
    "budgets": ("sizing", budgets),
    "serving": ("serving", serving),
    "serving_aims": ("serving", serving_aims),
    "operate": ("operate", operate),
    "interop": ("interop", interop.interop),
    "trust_faults": ("trust", trust.faults),
    "trust_endurance": ("trust", trust.endurance),
    "paper_depth": ("paper", tables.depth),
    "paper_cost": ("paper", tables.cost),
    "paper_totals": ("paper", tables.totals),
    "paper_ablations": ("paper", tables.ablations),
    "paper_tasks": ("paper", tables.tasks),
    "paper_budget": ("paper", tables.budget),
    "paper_shipped": ("paper", tables.shipped),
    "paper_emoji": ("paper", tables.emoji),
}
"""Name of a table to the result that it is made from, and how."""


def render(readme: str) -> str:
    """The README with every table made anew."""
    for name, (result, rows) in TABLES.items():
        path = RESULTS / f"{result}.json"
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if path.exists():
            made = _markdown(rows(json.loads(path.read_text())))
            readme = pattern.sub(lambda match, made=made: match[1] + made + match[2], readme)
    return readme


def _markdown(rows: Rows) -> str:
    lines = [rows[0], ("---",) * len(rows[0]), *rows[1:]]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def main() -> None:
    README.write_text(render(README.read_text()))


if __name__ == "__main__":
    main()
