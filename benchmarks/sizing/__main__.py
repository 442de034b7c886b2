"""`python -m benchmarks.sizing [PART …]`: all parts, or those that are named.

Each part's figures are kept in benchmarks/results/sizing.json as soon as it has ended; its
`summary` is what the README shows.
"""

from benchmarks.parts import run
from benchmarks.sizing import cases, dit_xl, kernel_cap, kinds, optimality, real, speed

PARTS = {
    "optimality": optimality.measure,
    "speed": speed.measure,
    "dit_xl": dit_xl.measure,
    "kernel_cap": kernel_cap.measure,
    "cases": cases.measure,
    "kinds": kinds.measure,
    "real": real.measure,
}
SUMMARY = {
    "cases": (
        "cases",
        "over_budget",
        "memory_error_median",
        "memory_error_max",
        "latency_error_median",
        "latency_within_budget_share",
    ),
    "dit_xl": ("dit_xl_dense_bf16_bytes", "dit_xl_factored_bytes"),
    "speed": ("solve_p99_seconds", "plan_http_p99_seconds"),
    "optimality": ("bruteforce_beaten",),
    "kinds": ("kinds_budgets", "kinds_over"),
    "real": ("real_memory_error",),
}

if __name__ == "__main__":
    parts = run("sizing", PARTS, SUMMARY)
    if "cases" in parts:
        cases.draw(parts["cases"]["measured"])
