"""`fineserve plan`: what POST /plan answers, as a table and as a picture."""

import logging
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from fineserve.cli.connection import connected
from fineserve.cli.options import (
    AsJson,
    BatchImages,
    FamilyName,
    GuidanceScale,
    GuidanceStart,
    GuidanceStop,
    GuideSize,
    MaxLatencyMs,
    MaxMemGb,
    Number,
    Percentile,
    SchedulerName,
    Text,
    Url,
    echo_table,
    fail,
    given,
    parsed_guide,
)
from fineserve.wire import PlanResponse
from learngenes.config import Sampling

cli = typer.Typer()

NEIGHBOURS = 6
"""Sizes of the front that are shown on either side of the plan."""


@cli.command()
def plan(
    max_mem_gb: MaxMemGb = None,
    max_latency_ms: MaxLatencyMs = None,
    latency_percentile: Percentile = None,
    family: FamilyName = None,
    mem_scope: Annotated[str | None, typer.Option(help="model or process")] = None,
    min_quality: Annotated[
        float | None, typer.Option(help="from 0 to 1, as plans state it")
    ] = None,
    n: BatchImages = None,
    num_inference_steps: Number = None,
    scheduler: SchedulerName = None,
    guidance_scale: GuidanceScale = None,
    guidance_start: GuidanceStart = None,
    guidance_stop: GuidanceStop = None,
    guide: GuideSize = None,
    depth: Number = None,
    rank: Number = None,
    mode: Annotated[str | None, typer.Option(help="factored, materialised or dense")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16, int8, int4 or int3")] = None,
    device_class: Text = None,
    plot: Annotated[Path | None, typer.Option(help="draw the Pareto front into this file")] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Plan a budget without making a model: the plan and its neighbours on the front."""
    budget = given(
        max_mem_gb=max_mem_gb,
        max_latency_ms=max_latency_ms,
        latency_percentile=latency_percentile,
        family=family,
        mem_scope=mem_scope,
        min_quality=min_quality,
        n=n,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
        guide=parsed_guide(guide),
        depth=depth,
        rank=rank,
        mode=mode,
        dtype=dtype,
        device_class=device_class,
    )
    with connected(url) as client:
        answer = client.plan(**budget)
    echo_table(_table(answer), answer, as_json)
    if not as_json:
        typer.echo(_explanation(answer))
    if plot is not None:
        try:
            _draw(answer, budget, plot)
        except PlotError as error:
            fail(error)
        typer.echo(f"the Pareto front is drawn in {plot}", err=as_json)


class PlotError(Exception):
    """The plan cannot be drawn."""


def _table(answer: PlanResponse) -> Table:
    """Table of the plan among its neighbours on the front, best first."""
    chosen, front = answer.plan, answer.front
    place = front.index(chosen)
    shown = range(max(0, place - NEIGHBOURS), min(len(front), place + NEIGHBOURS + 1))
    result = Table(
        title=f"{answer.family} on {answer.device_class}",
        caption=f"{shown.start + 1} to {shown.stop} of the {len(front)} sizes on the Pareto front",
    )
    for heading in ("", "depth", "rank", "mode", "dtype", "quality", "FD"):
        result.add_column(heading, justify="left" if heading in ("mode", "dtype") else "right")
    for heading in ("memory, MB", "process, MB", "median, ms", "p95, ms"):
        result.add_column(heading, justify="right")
    result.add_column("sampling")
    for i in shown:
        size, cost = front[i], front[i].predicted
        result.add_row(
            "→" if i == place else "",
            *map(str, (size.depth, size.rank, size.mode, size.dtype)),
            f"{size.quality:.4f}",
            "" if size.distance is None else f"{size.distance:.0f}",
            f"{cost.memory_bytes / 1e6:.1f}",
            f"{cost.process_memory_bytes / 1e6:.0f}",
            f"{cost.latency_seconds * 1e3:.0f}",
            f"{cost.latency_p95_seconds * 1e3:.0f}",
            told(size.sampling),
            style="bold" if i == place else None,
        )
    return result


def told(sampling: Sampling | None) -> str:
    """Sampling in a few words; records of earlier releases have none."""
    sampling = sampling or Sampling()
    steps = f"{sampling.num_inference_steps} {sampling.scheduler}"
    if not sampling.guided:
        return f"{steps}, unguided"
    guide, interval = sampling.guide, ""
    if sampling.guidance_start > 0 or sampling.guidance_stop < 1:
        interval = f" at {sampling.guidance_start:.0%}-{sampling.guidance_stop:.0%}"
    by = f" by {guide.depth}x{guide.rank}" if guide else ""
    return f"{steps}, guided {sampling.guidance_scale:g}{by}{interval}"


def _explanation(answer: PlanResponse) -> str:
    """Sentence on what binds the plan, and what of the budget is left."""
    slack = []
    if (memory_bytes := answer.slack.memory_bytes) is not None:
        slack.append(f"{memory_bytes / 1e6:.1f} MB")
    if (seconds := answer.slack.latency_seconds) is not None:
        slack.append(f"{seconds * 1e3:.0f} ms")
    binding = " and ".join(answer.binding)
    binds = f"bound by {binding}" if binding else "nothing binds: the family's best"
    return f"{binds}; left of the budget: {' and '.join(slack)}"


def _draw(answer: PlanResponse, budget: dict[str, Any], file: Path) -> None:
    """Draw the front in memory and quality, latency by colour, with the plan and its budget.

    Raises PlotError when matplotlib is not installed or `file` is no picture's name.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise PlotError("--plot needs matplotlib: pip install 'fineserve[plot]'") from error
    mpl.use("Agg")
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    scope = budget.get("mem_scope", "model")
    percentile = budget.get("latency_percentile", 95)
    front, chosen = answer.front, answer.plan
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.set_xscale("log")
    points = axes.scatter(
        [size.predicted.scoped_memory_bytes(scope) / 1e6 for size in front],
        [size.quality for size in front],
        c=[size.predicted.percentile_seconds(percentile) * 1e3 for size in front],
        norm="log",
        cmap="viridis_r",
        s=26,
    )
    x, y = chosen.predicted.scoped_memory_bytes(scope) / 1e6, chosen.quality
    axes.plot(x, y, "o", markersize=13, markerfacecolor="none", color="crimson", markeredgewidth=2)
    label = f"depth {chosen.depth}, rank {chosen.rank}\n{chosen.mode}, {chosen.dtype}"
    least, most = axes.get_xlim()
    left = x * x > least * most
    axes.annotate(
        label,
        (x, y),
        xytext=(-14 if left else 14, -14),
        textcoords="offset points",
        ha="right" if left else "left",
        va="top",
        color="crimson",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
    budget_mb = (budget.get("max_mem_gb") or float("inf")) * 1e3
    if budget_mb <= axes.get_xlim()[1]:
        axes.axvline(budget_mb, color="crimson", linestyle="--", linewidth=1)
    axes.set_xlabel(f"{scope} memory, MB")
    axes.set_ylabel("predicted quality")
    axes.set_title(f"{answer.family}: sizes that no other beats")
    axes.grid(alpha=0.3)
    bar = figure.colorbar(points, label=f"{percentile}th percentile of one batch, ms")
    for axis in (axes.xaxis, bar.ax.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())
    try:
        figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise PlotError(f"{file} cannot be written: {error}") from error
    finally:
        plt.close(figure)
