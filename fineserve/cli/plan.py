"""`fineserve plan`: what POST /plan answers, as a table and as a picture."""

import logging
from pathlib import Path
from typing import Any

from rich.table import Table

NEIGHBOURS = 6
"""Sizes of the front that are shown on either side of the plan."""
Answer = dict[str, Any]


class PlanError(Exception):
    """The plan cannot be drawn."""


def table(answer: Answer) -> Table:
    """The plan among its neighbours on the front, best first."""
    chosen, front = answer["plan"], answer["front"]
    place = front.index(chosen)
    shown = range(max(0, place - NEIGHBOURS), min(len(front), place + NEIGHBOURS + 1))
    result = Table(
        title=f"{answer['family']} on {answer['device_class']}",
        caption=f"{shown.start + 1} to {shown.stop} of the {len(front)} sizes on the Pareto front",
    )
    for heading in ("", "depth", "rank", "mode", "dtype", "quality"):
        result.add_column(heading, justify="left" if heading in ("mode", "dtype") else "right")
    for heading in ("memory, MB", "process, MB", "median, ms", "p95, ms"):
        result.add_column(heading, justify="right")
    for i in shown:
        plan = front[i]
        cost = plan["predicted"]
        result.add_row(
            "→" if i == place else "",
            *(str(plan[name]) for name in ("depth", "rank", "mode", "dtype")),
            f"{plan['quality']:.4f}",
            f"{cost['memory_bytes'] / 1e6:.1f}",
            f"{cost['process_memory_bytes'] / 1e6:.0f}",
            f"{cost['latency_seconds'] * 1e3:.0f}",
            f"{cost['latency_p95_seconds'] * 1e3:.0f}",
            style="bold" if i == place else None,
        )
    return result


def explanation(answer: Answer) -> str:
    """What binds, and what is left."""
    slack = []
    if (memory_bytes := answer["slack"]["memory_bytes"]) is not None:
        slack.append(f"{memory_bytes / 1e6:.1f} MB")
    if (seconds := answer["slack"]["latency_seconds"]) is not None:
        slack.append(f"{seconds * 1e3:.0f} ms")
    binding = " and ".join(answer["binding"])
    binds = f"bound by {binding}" if binding else "nothing binds: the family's best"
    return f"{binds}; left of the budget: {' and '.join(slack)}"


def draw(answer: Answer, request: dict[str, Any], file: Path) -> None:
    """The front in memory and quality, latency by colour; the plan and its budget marked.

    Raises PlanError when matplotlib is not installed or `file` is no picture's name.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlanError("--plot needs matplotlib: pip install 'fineserve[plot]'") from error
    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    process = request.get("mem_scope") == "process"
    name = "process_memory_bytes" if process else "memory_bytes"
    front, chosen = answer["front"], answer["plan"]
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_xscale("log")
    points = axes.scatter(
        [plan["predicted"][name] / 1e6 for plan in front],
        [plan["quality"] for plan in front],
        c=[plan["predicted"]["latency_p95_seconds"] * 1e3 for plan in front],
        norm="log",
        cmap="viridis_r",
        s=26,
    )
    x, y = chosen["predicted"][name] / 1e6, chosen["quality"]
    axes.plot(x, y, "o", markersize=13, markerfacecolor="none", color="crimson", markeredgewidth=2)
    size = f"depth {chosen['depth']}, rank {chosen['rank']}\n{chosen['mode']}, {chosen['dtype']}"
    least, most = axes.get_xlim()
    left = x * x > least * most
    axes.annotate(
        size,
        (x, y),
        xytext=(-14 if left else 14, -14),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color="crimson",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    budget_mb = (request.get("max_mem_gb") or float("inf")) * 1e3
    if budget_mb <= axes.get_xlim()[1]:
        axes.axvline(budget_mb, color="crimson", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{'process' if process else 'model'} memory, MB")
    axes.set_ylabel("predicted quality (family's best: 1)")
    axes.set_title(f"{answer['family']}: sizes that no other beats")
    axes.grid(alpha=0.3)
    bar = figure.colorbar(points, label="95th percentile of one batch, ms")
    for axis in (axes.xaxis, bar.ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise PlanError(f"{file} cannot be written: {error}") from error
    finally:
        plt.close(figure)
