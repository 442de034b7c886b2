"""`python -m benchmarks.sampling [PART …]`: benchmarks/results/sampling.json."""

from benchmarks.parts import run
from benchmarks.sampling import defaults, guides, joint

PARTS = {
    "guides_fashion": guides.fashion,
    "guides_emoji": guides.emoji,
    "fashion": defaults.fashion,
    "emoji": defaults.emoji,
    "joint": joint.measure,
}
SUMMARY = {
    "fashion": (
        "fashion_default_fd_excess_over_before",
        "fashion_default_cost_over_before",
        "default_class_accuracy",
    ),
    "emoji": ("emoji_default_fd_excess_over_before", "emoji_default_cost_over_before"),
    "joint": ("joint_worse_than_brute_force", "solve_p99_ms", "kept_solve_p99_ms"),
}

if __name__ == "__main__":
    run("sampling", PARTS, SUMMARY)
