"""Write the README's table of figures from benchmarks/results: `make bench-main-job` calls it."""

import json
import re
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).parent.parent
README = REPOSITORY / "README.md"
RESULT = REPOSITORY / "benchmarks" / "results" / "main_job.json"
TABLE = re.compile(r"(<!-- main_job -->\n).*?(<!-- /main_job -->)", re.DOTALL)


def table(result: dict[str, Any]) -> str:
    s, f = result["summary"], result["figures"]
    tests = "not finished"
    if s["test_seconds"] is not None:
        tests = f"{s['test_seconds']} s, {s['coverage']:.0f} % coverage"
    rows = [
        ("`make up` to ready, cold virtual environment", f"{s['up_seconds']:.0f} s"),
        ("POST to the first image (revision 0)", f"{s['first_image_seconds']:.1f} s"),
        ("POST to `ready` (Σ retrained and measured)", f"{s['ready_seconds']:.0f} s"),
        (
            "measured over predicted memory",
            f"{f['measured']['memory_bytes'] / f['predicted']['memory_bytes']:.3f}",
        ),
        (
            "requested class found by a classifier in 1,000 samples "
            f"(real test set: {f['class_accuracy_real_test_set']:.1%})",
            f"{s['class_accuracy']:.1%}",
        ),
        ("largest difference from diffusers' DiT", f"{s['diffusers_max_abs_diff']:.1e}"),
        (
            "one request over HTTP / plain diffusers, same images",
            f"{f['request_seconds_over_plain_diffusers']:.2f} times",
        ),
        (
            "`ready` again after SIGKILL to the build worker",
            f"{f['ready_after_kill_seconds']:.0f} s",
        ),
        ("`make test`", tests),
    ]
    return "| | |\n|---|---|\n" + "".join(f"| {name} | {value} |\n" for name, value in rows)


def render(readme: str, result: dict[str, Any]) -> str:
    return TABLE.sub(lambda match: match[1] + table(result) + match[2], readme)


def main() -> None:
    README.write_text(render(README.read_text(), json.loads(RESULT.read_text())))


if __name__ == "__main__":
    main()
