"""`python -m benchmarks.training [PART …]`: benchmarks/results/training.json."""

from benchmarks.parts import run
from benchmarks.training import speed

PARTS = {"speed": speed.measure}
SUMMARY = {
    "speed": (
        "images_per_second_over_before",
        "heldout_loss_over_before",
        "over_before_at_one_depth",
        "gemm_peak_share",
    )
}

if __name__ == "__main__":
    run("training", PARTS, SUMMARY)
