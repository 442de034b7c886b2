"""`python -m benchmarks.start [PART …]`: benchmarks/results/start.json."""

from benchmarks.parts import run
from benchmarks.start import compose, curve, examples, first, promise, recovery, task, ways

PARTS = {
    "first": first.idle,
    "busy": first.busy,
    "ways": ways.measure,
    "recovery": recovery.measure,
    "curve": curve.measure,
    "estimate": curve.estimate,
    "promise": promise.measure,
    "hour": promise.hour,
    "task": task.measure,
    "examples": examples.measure,
    "compose": compose.measure,
}
SUMMARY = {
    "first": (
        "install_seconds",
        "installed_bytes",
        "first_image_seconds",
        "second_start_seconds",
    ),
    "busy": ("first_image_busy_seconds",),
    "ways": (
        "make_up_seconds",
        "first_image_by_curl_seconds",
        "first_image_by_python_seconds",
        "first_image_by_openai_seconds",
        "first_image_by_page_seconds",
    ),
    "recovery": ("recovery_median_seconds", "recovery_worst_seconds", "build_recovery_seconds"),
    "curve": ("graphs", "compile_seconds"),
    "estimate": ("profile_error_after_10_min", "interval_true_share"),
    "promise": ("promise_error_median", "p95_kept", "build_seconds"),
    "hour": ("profile_change_after_an_hour",),
    "task": ("task_accuracy",),
    "examples": ("examples_refused",),
    "compose": (
        "compose_first_image_seconds",
        "compose_second_start_seconds",
        "compose_recovery_seconds",
    ),
}

if __name__ == "__main__":
    run("start", PARTS, SUMMARY)
