"""The tables of how well sizing keeps its word."""

from typing import Any

from benchmarks.parts import Table


def sizing(result: dict[str, Any]) -> Table:
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


def dit_xl(result: dict[str, Any]) -> Table:
    part = result["parts"]["dit_xl"]
    dense = part["ways"]["dense bfloat16"]
    table: Table = [
        ("depth 28", "weights, MB", "peak, MB", "process, MB", "seconds / dense bfloat16")
    ]
    least = part["least_budget_of_full_depth"]
    name = f"least budget: {least['size'].removeprefix('L28 ')}"
    for way, figures in (*part["ways"].items(), (name, least)):
        table.append(
            (
                way,
                f"{figures['weight_bytes'] / 1e6:.1f}",
                f"{figures['measured_bytes'] / 1e6:.1f}",
                f"{figures['measured_process_bytes'] / 1e6:.0f}",
                f"{figures['measured_seconds'] / dense['measured_seconds']:.2f}",
            )
        )
    return table


def budgets(result: dict[str, Any]) -> Table:
    table: Table = [
        ("`max_mem_gb`", "`max_latency_ms`", "the plan", "quality", "predicted, MB", "measured, MB")
    ]
    for row in result["parts"]["dit_xl"]["budgets"]:
        table.append(
            (
                f"{row['max_mem_gb']:g}",
                f"{row['max_latency_ms'] or ''}",
                row["size"],
                f"{row['quality']:.4f}",
                f"{row['predicted_bytes'] / 1e6:.1f}",
                f"{row['measured_bytes'] / 1e6:.1f}",
            )
        )
    return table
