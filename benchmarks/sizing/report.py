"""The tables of how well sizing keeps its word."""

from benchmarks.parts import Figures, Table, rows


def sizing(result: Figures) -> Table:
    s, parts = result["summary"], result["parts"]
    cap, cases = parts["kernel_cap"], parts["cases"]
    noise = cases["machine_noise"]
    table = rows(
        f"""| aim | measured
        memory, predicted beside measured: median (worst) error | ≤ 2 % (≤ 5 %) \
            | {s["memory_error_median"]:.2%} ({s["memory_error_max"]:.2%})
        of {s["cases"]} random budgets, over in memory | 0 | {s["over_budget"]}
        latency, predicted beside measured: median error | ≤ 10 % | {s["latency_error_median"]:.1%}
        95th percentile within the latency budget | ≥ 95 % \
            | {s["latency_within_budget_share"]:.1%} of {cases["latency_budgets"]}
        the machine: {noise["what"]}, median distance from their median \
            | | {noise["error_median"]:.1%}
        process budgets: runs under a kernel limit of the budget · 10 % less is refused | 5 · 5 \
            | {cap["ran_at_the_budget"]} · {cap["refused_by_the_plan_at_nine_tenths"]}
        solve, 99th percentile of 10,000 | ≤ 5 ms | {s["solve_p99_seconds"] * 1e3:.1f} ms
        `POST /plan` at 50 a second, 99th percentile | ≤ 20 ms \
            | {s["plan_http_p99_seconds"] * 1e3:.1f} ms
        better sizes found by brute force in 10,000 | 0 | {s["bruteforce_beaten"]}"""
    )
    if real := parts.get("real"):
        table += rows(
            f"""4 GB for the process, {real["images"]} images of DiT-XL/2's shapes at 512: \
                {real["size"]} (without a budget {real["without_budget"]}); memory measured beside \
                predicted | ≤ 5 % \
                | {real["real_memory_error"]:.2%}"""
        )
    return table


def dit_xl(result: Figures) -> Table:
    part = result["parts"]["dit_xl"]
    dense_seconds = part["ways"]["dense bfloat16"]["measured_seconds"]
    table = rows("depth 28 | weights, MB | peak, MB | process, MB | seconds / dense bfloat16")
    least = part["least_budget_of_full_depth"]
    name = f"least budget: {least['size'].removeprefix('L28 ')}"
    for way, figures in (*part["ways"].items(), (name, least)):
        table += rows(
            f"""{way} | {figures["weight_bytes"] / 1e6:.1f} \
                | {figures["measured_bytes"] / 1e6:.1f} \
                | {figures["measured_process_bytes"] / 1e6:.0f} \
                | {figures["measured_seconds"] / dense_seconds:.2f}"""
        )
    return table


def budgets(result: Figures) -> Table:
    table = rows(
        "`max_mem_gb` | `max_latency_ms` | the plan | quality | predicted, MB | measured, MB"
    )
    for row in result["parts"]["dit_xl"]["budgets"]:
        table += rows(
            f"""{row["max_mem_gb"]:g} | {row["max_latency_ms"] or ""} | {row["size"]} \
                | {row["quality"]:.4f} | {row["predicted_bytes"] / 1e6:.1f} \
                | {row["measured_bytes"] / 1e6:.1f}"""
        )
    return table
