"""`python -m benchmarks.elastic [PART …]`: benchmarks/results/elastic.json."""

from benchmarks.elastic import crowd, finishing
from benchmarks.parts import run

PARTS = {
    "solo": crowd.solo,
    "trace": crowd.trace,
    "fairness": crowd.fairness,
    "crowd": crowd.crowd,
    "finishing": finishing.finishing,
    "pictures": finishing.pictures,
}
SUMMARY = {
    "crowd": (
        "promises_kept_1x",
        "promises_kept_2x",
        "promises_kept_4x",
        "goodput_ratio_4x",
        "quality_0_5x",
        "refused_2x",
    ),
    "fairness": ("modest_p95_ratio",),
    "solo": ("prediction_error_median",),
    "trace": ("simulator_gap",),
    "finishing": ("finished_half_fd_over_smaller_alone",),
}

if __name__ == "__main__":
    run("elastic", PARTS, SUMMARY)
