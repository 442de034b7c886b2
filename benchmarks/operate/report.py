"""The table of what operators and strangers meet."""

from benchmarks.parts import Figures, Table, rows


def operate(result: Figures) -> Table:
    s, parts = result["summary"], result["parts"]
    composed, stranger, suites = parts["compose"], parts["stranger"], parts["suites"]
    service, worker = (s[f"{image}_image_bytes"] / 1e6 for image in ("service", "worker"))
    return rows(
        f"""|
        images: service · worker | {service:.0f} · {worker:.0f} MB
        … built, on base images made of Debian's packages | {composed["build_seconds"]:.0f} s
        compose: up to ready · a model ready · its images | {composed["up_seconds"]:.0f} \
            · {composed["ready_model_seconds"]:.0f} · {composed["images_seconds"]:.1f} s
        left out there, since it cannot be had here | {", ".join(composed["left_out"])}
        dashboards: panels with data · queries with data \
            | {s["panels_with_data"]} of {s["panels"]} \
            · {suites["queries_with_data"]} of {suites["queries"]}
        the page: first paint · plan shown | {stranger["page_first_paint_seconds"]:.2f} \
            · {s["page_interactive_seconds"]:.2f} s
        … serious accessibility violations | {s["axe_serious"]}
        hosts that `fineserve doctor` sees through \
            | {s["doctor_cases_ok"]} of {suites["doctor_cases"]}
        fresh clone: `make up`, deploy by slider, images, `make down` \
            | {s["stranger_seconds"]:.0f} s"""
    )
