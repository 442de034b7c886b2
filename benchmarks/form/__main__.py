"""`python -m benchmarks.form [PART …]`: benchmarks/results/form.json."""

from benchmarks.form import mix, quality, unprepared
from benchmarks.parts import run

PARTS = {
    "rivals": quality.rivals,
    "form": quality.form,
    "unprepared": unprepared.measure,
    "mix": mix.measure,
}
SUMMARY = {
    "form": (
        "full_loss_over_dense",
        "l4_loss_over_shipped",
        "l8_fd_over_pruned",
        "depth_monotone",
        "full_fd",
        "dense_fd",
    ),
    "unprepared": ("unprepared_loss_over_prepared", "unprepared_seconds"),
    "mix": ("mix20_over_7f885ee", "resident_20_over_1"),
}

if __name__ == "__main__":
    run("form", PARTS, SUMMARY)
