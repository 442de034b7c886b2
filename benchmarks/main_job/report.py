"""The table of the main job."""

from benchmarks.parts import Figures, Table, rows


def main_job(result: Figures) -> Table:
    s, f = result["summary"], result["figures"]
    tests = "not finished"
    if s["test_seconds"] is not None:
        tests = f"{s['test_seconds']} s, {s['coverage']:.0f} % coverage"
    return rows(
        f"""|
        `make up` to ready, cold virtual environment | {s["up_seconds"]:.0f} s
        POST to the first image (revision 0) | {s["first_image_seconds"]:.1f} s
        POST to `ready` (Σ retrained and measured) | {s["ready_seconds"]:.0f} s
        requested class found by a classifier in 1,000 samples \
            (real test set: {f["class_accuracy_real_test_set"]:.1%}) | {s["class_accuracy"]:.1%}
        largest difference from diffusers' DiT | {s["diffusers_max_abs_diff"]:.1e}
        one request over HTTP / plain diffusers, same images \
            | {f["request_seconds_over_plain_diffusers"]:.2f} times
        `ready` again after SIGKILL to the build worker | {f["ready_after_kill_seconds"]:.0f} s
        `make test` | {tests}"""
    )
