"""`python -m benchmarks.serving [PART …]`: all parts, or those that are named.

Each part's figures are kept in benchmarks/results/serving.json as soon as it has ended; its
`summary` is what the README shows.
"""

from benchmarks.parts import run
from benchmarks.serving import correctness, density, roofline, throughput
from benchmarks.serving.plot import plot

PARTS = {
    "roofline": roofline.measure,
    "correctness": correctness.measure,
    "density": density.measure,
    "throughput": throughput.measure,
}
SUMMARY = {
    "throughput": (
        "speedup_1_client",
        "speedup_16_clients",
        "speedup_1_client_best_dtype",
        "speedup_16_clients_best_dtype",
        "speedup_mix20_vs_best_peer",
        "p95_ratio_worst",
        "overhead_p50_seconds",
        "overhead_p95_seconds",
    ),
    "roofline": ("gemm_peak_share",),
    "density": ("resident_ratio_100_models", "mix100_throughput_ratio"),
    "correctness": ("solo_vs_batch_mismatches",),
}

if __name__ == "__main__":
    parts = run("serving", PARTS, SUMMARY)
    if "throughput" in parts:
        plot(parts["throughput"]["servers"])
