"""The table of what operators and strangers meet."""

from typing import Any

from benchmarks.parts import Table


def operate(result: dict[str, Any]) -> Table:
    s, parts = result["summary"], result["parts"]
    composed, stranger, suites = parts["compose"], parts["stranger"], parts["suites"]
    return [
        ("", ""),
        (
            "images: service · worker",
            f"{s['service_image_bytes'] / 1e6:.0f} · {s['worker_image_bytes'] / 1e6:.0f} MB",
        ),
        ("… built, on base images made of Debian's packages", f"{composed['build_seconds']:.0f} s"),
        (
            "compose: up to ready · a model ready · its images",
            f"{composed['up_seconds']:.0f} · {composed['ready_model_seconds']:.0f} · "
            f"{composed['images_seconds']:.1f} s",
        ),
        ("left out there, since it cannot be had here", ", ".join(composed["left_out"])),
        (
            "dashboards: panels with data · queries with data",
            f"{s['panels_with_data']} of {s['panels']} · "
            f"{suites['queries_with_data']} of {suites['queries']}",
        ),
        (
            "the page: first paint · plan shown",
            f"{stranger['page_first_paint_seconds']:.2f} · {s['page_interactive_seconds']:.2f} s",
        ),
        ("… serious accessibility violations", str(s["axe_serious"])),
        (
            "hosts that `fineserve doctor` sees through",
            f"{s['doctor_cases_ok']} of {suites['doctor_cases']}",
        ),
        (
            "fresh clone: `make up`, deploy by slider, images, `make down`",
            f"{s['stranger_seconds']:.0f} s",
        ),
    ]
