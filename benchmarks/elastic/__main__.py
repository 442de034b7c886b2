"""`python -m benchmarks.elastic [PART …]`: benchmarks/results/elastic.json."""

from benchmarks.elastic import crowd, finishing
from benchmarks.parts import run

PARTS = {
    "solo": crowd.solo,
    "trace": crowd.trace,
    "fairness": crowd.fairness,
    "calm": crowd.calm,
    "crowd": crowd.crowd,
    "peers": crowd.of_peers,
    "finishing": finishing.finishing,
    "pictures": finishing.pictures,
}
SUMMARY = {
    "calm": ("promises_kept_1x", "quality_0_5x"),
    "crowd": ("promises_kept_2x", "promises_kept_4x", "goodput_ratio_4x", "refused_2x"),
    "peers": ("goodput_over_best_peer_4x",),
    "fairness": ("modest_p95_ratio",),
    "solo": ("prediction_error_median",),
    "trace": ("simulator_gap",),
    "finishing": ("finished_half_fd_over_smaller_alone",),
}

if __name__ == "__main__":
    run("elastic", PARTS, SUMMARY)
