"""`fineserve models …` and `fineserve generate`: what the page does, for scripts."""

import base64
import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
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
    ModelId,
    Number,
    Percentile,
    SchedulerName,
    Text,
    Url,
    echo,
    echo_deleted,
    echo_table,
    fail,
    given,
    parsed_guide,
)
from fineserve.client import Client
from fineserve.wire import ExportFormat, ModelResponse
from learngenes.sizing.budget import LatencyPercentile

cli = typer.Typer(no_args_is_help=True, help="Make, watch and delete models.")

MODEL_ID = re.compile(r"m-[0-9a-f]{16}")
Show = Callable[..., None]
"""Callback that changes a progress bar, as rich's `Progress.update` does."""


@cli.command()
def create(
    max_mem_gb: MaxMemGb = None,
    max_latency_ms: MaxLatencyMs = None,
    latency_percentile: Percentile = None,
    name: Text = None,
    family: FamilyName = None,
    task: Annotated[
        str | None, typer.Option(help="of `fineserve tasks create`: images of other classes")
    ] = None,
    n: BatchImages = None,
    num_inference_steps: Number = None,
    scheduler: SchedulerName = None,
    guidance_scale: GuidanceScale = None,
    guidance_start: GuidanceStart = None,
    guidance_stop: GuidanceStop = None,
    guide: GuideSize = None,
    refine_seconds: Annotated[
        int | None, typer.Option(help="train every weight for so long after Sigma")
    ] = None,
    elastic: Annotated[
        float | None,
        typer.Option(help="least quality to which smaller sizes may serve it under load"),
    ] = None,
    wait: Annotated[bool, typer.Option(help="until it is ready")] = True,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make the best model that a budget allows."""
    budget = given(
        max_mem_gb=max_mem_gb,
        max_latency_ms=max_latency_ms,
        latency_percentile=latency_percentile,
        name=name,
        family=family,
        task=task,
        n=n,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
        guide=parsed_guide(guide),
        refine=None if refine_seconds is None else {"max_seconds": refine_seconds},
        elastic=None if elastic is None else {"min_quality": elastic},
    )
    with connected(url) as client:
        model = client.create_model(**budget)
        _show(_watched(client, model.id, quiet=as_json) if wait else model, as_json)


@cli.command("list")
def list_models(as_json: AsJson = False, url: Url = None) -> None:
    """List models, newest first."""
    with connected(url) as client:
        models = list(client.models())
    table = Table("id", "name", "state", "size", "memory", "p95", "revision")
    for model in models:
        table.add_row(model.id, model.name, model.status, *_figures(model).values())
    echo_table(table, models, as_json)


@cli.command()
def show(model: ModelId, as_json: AsJson = False, url: Url = None) -> None:
    """Show one model."""
    with connected(url) as client:
        _show(client.model(model), as_json)


@cli.command()
def watch(model: ModelId, as_json: AsJson = False, url: Url = None) -> None:
    """Follow a build to its end."""
    with connected(url) as client:
        _show(_watched(client, model, quiet=as_json), as_json)


@cli.command("continue")
def continue_(
    model: ModelId,
    wait: Annotated[bool, typer.Option(help="until it is ready")] = True,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Train a model on that time ended before it was trained enough."""
    with connected(url) as client:
        client.continue_model(model)
        shown = _watched(client, model, quiet=as_json) if wait else client.model(model)
        _show(shown, as_json)


@cli.command()
def export(
    model: ModelId,
    out: Annotated[Path, typer.Option(help="its directory is made in here")] = Path(),
    form: Annotated[
        ExportFormat, typer.Option("--format", help="see the API's documentation")
    ] = ExportFormat.DIFFUSERS,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Fetch a model as a directory that plain diffusers loads, or in another format."""
    if (out / model).exists():
        fail(f"{out / model} exists; remove it, or choose another --out")
    with connected(url) as client, _bar("writing it out", quiet=as_json) as update:
        directory = client.export(
            model,
            out,
            form,
            lambda done, total: update(description="fetching", completed=done, total=total),
        )
    echo(directory, {"directory": directory}, as_json)


@cli.command()
def cancel(
    models: Annotated[list[str], typer.Argument(help="ids")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Stop what is under way; a model that is refined keeps the best so far."""
    with connected(url) as client:
        for model in models:
            stopped = client.cancel_model(model)
            echo(f"{model} is {stopped.status}", {"id": model, "status": stopped.status}, as_json)


@cli.command()
def delete(
    models: Annotated[list[str], typer.Argument(help="ids")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Remove models and what they stored."""
    with connected(url) as client:
        for model in models:
            client.delete_model(model)
            echo_deleted(model, as_json)


def generate(
    model: Annotated[
        str, typer.Argument(help="a model's id, or a family where --deadline-seconds is given")
    ],
    class_label: Annotated[
        list[str] | None, typer.Option("--class", help="name or number; by default every class")
    ] = None,
    n: Annotated[int | None, typer.Option(help="images; by default one for each class")] = None,
    num_inference_steps: Annotated[
        int | None, typer.Option("--steps", "--num-inference-steps")
    ] = None,
    scheduler: SchedulerName = None,
    guidance_scale: GuidanceScale = None,
    guidance_start: GuidanceStart = None,
    guidance_stop: GuidanceStop = None,
    guide: GuideSize = None,
    seed: Number = None,
    deadline_seconds: Annotated[
        float | None, typer.Option(help="of a family: its best size that is there by then")
    ] = None,
    min_quality: Annotated[float | None, typer.Option(help="least quality of a family")] = None,
    out: Annotated[Path, typer.Option(help="directory for the PNGs")] = Path(),
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Sample images and save them as PNG."""
    request = given(
        class_labels=class_label or None,
        n=n,
        num_inference_steps=num_inference_steps,
        scheduler=scheduler,
        guidance_scale=guidance_scale,
        guidance_start=guidance_start,
        guidance_stop=guidance_stop,
        guide=parsed_guide(guide),
        seed=seed,
        deadline_seconds=deadline_seconds,
        min_quality=min_quality,
    )
    with connected(url) as client:
        if MODEL_ID.fullmatch(model):
            asked = client.create_generation(model, **request)
        else:
            asked = client.create_generation(family=model, **request)
        with _bar("sampling", quiet=as_json) as update:
            done = client.wait_generation(asked.id, _following(update))
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for image in done.images:
        file = out / f"{done.id}-class{image.class_label}-seed{image.seed}.png"
        file.write_bytes(base64.b64decode(image.b64_png))
        files.append(str(file))
    answer = {**done.model_dump(exclude={"images"}), "files": files}
    echo("\n".join(files), answer, as_json)


@contextlib.contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[Show]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda **shown: bar.update(task, **shown)


def _following(update: Show) -> Callable[[str, dict[str, Any]], None]:
    """Progress bar of a record's events."""

    def heard(name: str, data: dict[str, Any]) -> None:
        if name == "status":
            update(description=data["status"])
        elif name == "progress":
            update(completed=data["step"], total=data["steps"])

    return heard


def _watched(client: Client, model_id: str, *, quiet: bool) -> ModelResponse:
    """Wait for a model. Raises NotReady."""
    with _bar("queued", quiet=quiet) as update:
        return client.wait(model_id, _following(update))


def _figures(model: ModelResponse, percentile: LatencyPercentile = 95) -> dict[str, str]:
    plan, cost = model.plan, model.measured or model.plan.predicted
    return {
        "size": f"depth {plan.depth}, rank {plan.rank}",
        "memory": f"{cost.memory_bytes / 1e6:.1f} MB",
        f"latency, p{percentile}": f"{cost.percentile_seconds(percentile) * 1e3:.0f} ms",
        "revision": str(model.revision),
    }


def _show(model: ModelResponse, as_json: bool) -> None:
    told = "measured" if model.measured else "predicted"
    lines = [
        f"{model.id}  {model.name}",
        f"  {model.status}{': ' + model.error if model.error else ''}",
    ]
    for name, figure in _figures(model, model.budget.latency_percentile).items():
        note = f" ({told})" if name.startswith(("memory", "latency")) else ""
        lines.append(f"  {name}: {figure}{note}")
    echo("\n".join(lines), model, as_json)
