"""The table of starts and promises."""

from benchmarks.parts import Figures, Table, rows


def start(result: Figures) -> Table:
    s, parts = result["summary"], result["parts"]
    lines = [
        "| aim | measured",
        f"install, seconds | | {s['install_seconds']}: {s['installed_bytes'] / 1e9:.2f} GB",
        _line("first start to first image, seconds", 20, s["first_image_seconds"]),
        _line("… beside a process that takes a core", 45, s["first_image_busy_seconds"]),
        _line("second start to first image, seconds", 8, s["second_start_seconds"]),
        _line(
            "sampling worker killed: to the next image, median", 10, s["recovery_median_seconds"]
        ),
        _line("… worst of 20", 20, s["recovery_worst_seconds"]),
        _line("build worker killed: to its next step", 10, s["build_recovery_seconds"]),
    ]
    if ways := parts.get("ways"):
        names = ("curl", "python", "openai", "page")
        seconds = (f"{ways[f'first_image_by_{name}_seconds']:g}" for name in names)
        lines.append(
            f"`make up` in a fresh clone, seconds | | {ways['make_up_seconds']:g}\n"
            "… from there to a first image by curl, Python, OpenAI's client, page, seconds "
            f"| | {' · '.join(seconds)}"
        )
    if promise := parts.get("promise"):
        (least, most), kept = promise["build_seconds"], promise["p95_kept"]
        lines += [
            _line("served over measured, median error", 0.1, promise["promise_error_median"]),
            f"measured over predicted, median error | | {promise['predicted_error_median']:.1%}",
            f"95th percentile kept | ≥ 95% | {_judged(kept, kept >= 0.95)}",
            f"a budget to `ready`, smallest and largest | | {least:.0f} s, {most:.0f} s",
        ]
    if hour := parts.get("hour"):
        change = hour["profile_change_after_an_hour"]
        lines.append(
            _line("predictions after an hour beside a process that takes a core", 0.1, change)
        )
    if curve := parts.get("curve"):
        rates = (curve[f"images_per_second_{when}"] for when in ("first", "last"))
        lines += [
            f"graphs compiled, seconds | | {curve['graphs']}, {curve['compile_seconds']}",
            f"images a second, first and after ten minutes | | {' · '.join(map(str, rates))}",
        ]
    if estimate := parts.get("estimate"):
        true, error = estimate["interval_true_share"], estimate["profile_error_after_10_min"]
        lines += [
            _line("predicted after ten minutes, median error", 0.15, error),
            f"estimates whose range is true | ≥ 90% | {_judged(true, true >= 0.9)}",
        ]
    if task := parts.get("task"):
        found = task["task_accuracy"]
        lines.append(
            f"shapes of a task found when it is ready ({task['task_steps']} steps) | ≥ 90% "
            f"| {_judged(found, found >= 0.9)}"
        )
    if examples := parts.get("examples"):
        refused = len(examples["examples_refused"])
        lines.append(f"examples with a latency refused, idle and busy | 0 | {refused}")
    if composed := parts.get("compose"):
        names = ("first_image", "second_start", "recovery")
        seconds = (f"{composed[f'compose_{name}_seconds']:g}" for name in names)
        lines.append(
            "docker compose, seconds: first start, second start, sampling container killed "
            f"| | {' · '.join(seconds)}"
        )
    return rows("\n".join(lines))


def _line(what: str, aim: float, measured: float) -> str:
    shown, wanted = (f"{v:.1%}" if aim < 1 else f"{v:g}" for v in (measured, aim))
    return f"{what} | ≤ {wanted} | {shown if measured <= aim else f'**{shown}**, missed'}"


def _judged(share: float, met: bool) -> str:
    return f"{share:.1%}" if met else f"**{share:.1%}**, missed"
