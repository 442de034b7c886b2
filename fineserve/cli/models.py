"""`fineserve models …` and `fineserve generate`: what the page does, for scripts."""

import base64
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from fineserve.remote import REFUSED, Answer, Remote, RemoteError
from fineserve.wire import ExportFormat
from learngenes.data.images import DataError

cli = typer.Typer(no_args_is_help=True, help="Make, watch and delete models.")

Url = Annotated[str | None, typer.Option(help="of the service; by default this host's")]
AsJson = Annotated[bool, typer.Option("--json", help="the service's answer, for scripts")]
ModelId = Annotated[str, typer.Argument(help="as `fineserve models list` shows it")]


@contextlib.contextmanager
def refusals() -> Iterator[None]:
    """A refusal is one line and an exit code: 1 refused or failed, 3 nobody answers."""
    try:
        yield
    except RemoteError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(error.exit_code) from error
    except DataError as error:
        typer.secho(str(error), err=True, fg="red")
        raise typer.Exit(REFUSED) from error


@cli.command()
def create(
    max_mem_gb: Annotated[float | None, typer.Option(help="of 10^9 bytes")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="95th percentile of a batch")] = None,
    name: Annotated[str | None, typer.Option()] = None,
    family: Annotated[str | None, typer.Option()] = None,
    task: Annotated[
        str | None, typer.Option(help="of `fineserve tasks create`: images of other classes")
    ] = None,
    n: Annotated[int | None, typer.Option(help="images in one batch")] = None,
    num_inference_steps: Annotated[int | None, typer.Option()] = None,
    refine_seconds: Annotated[
        int | None, typer.Option(help="train every weight for so long after Sigma")
    ] = None,
    wait: Annotated[bool, typer.Option(help="until it is ready")] = True,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Make the best model that a budget allows."""
    stated = {
        "max_mem_gb": max_mem_gb,
        "max_latency_ms": max_latency_ms,
        "name": name,
        "family": family,
        "task": task,
        "n": n,
        "num_inference_steps": num_inference_steps,
    }
    with refusals(), Remote(url) as remote:
        body: Answer = {field: value for field, value in stated.items() if value is not None}
        if refine_seconds is not None:
            body["refine"] = {"max_seconds": refine_seconds}
        model = remote.post("/models", body)
        if wait:
            model = _watch(remote, model["id"], quiet=as_json)
        _show(model, as_json)


@cli.command("list")
def list_models(as_json: AsJson = False, url: Url = None) -> None:
    """Newest first."""
    with refusals(), Remote(url) as remote:
        models: list[Answer] = []
        offset: int | None = 0
        while offset is not None:
            page = remote.get("/models", offset=offset, limit=200)
            models += page["models"]
            offset = page["next_offset"]
    if as_json:
        typer.echo(json.dumps(models))
        return
    table = Table("id", "name", "state", "size", "memory", "p95", "revision")
    for model in models:
        table.add_row(model["id"], model["name"], model["status"], *_figures(model).values())
    Console(width=None if Console().is_terminal else 160).print(table)


@cli.command()
def show(model: ModelId, as_json: AsJson = False, url: Url = None) -> None:
    """One model."""
    with refusals(), Remote(url) as remote:
        _show(remote.get(f"/models/{model}"), as_json)


@cli.command()
def watch(model: ModelId, as_json: AsJson = False, url: Url = None) -> None:
    """Follow a build to its end."""
    with refusals(), Remote(url) as remote:
        _show(_watch(remote, model, quiet=as_json), as_json)


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
    directory = out / model
    with refusals(), Remote(url) as remote, _bar("writing it out", quiet=as_json) as (bar, task):
        if directory.exists():
            raise RemoteError(f"{directory} exists; remove it, or choose another --out")

        def on_bytes(done: int, total: int) -> None:
            bar.update(task, description="fetching", completed=done, total=total)

        out.mkdir(parents=True, exist_ok=True)
        remote.unpack(f"/models/{model}/export?format={form}", out, on_bytes)
    typer.echo(json.dumps({"directory": str(directory)}) if as_json else str(directory))


@cli.command()
def delete(
    models: Annotated[list[str], typer.Argument(help="ids")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Remove models and what they stored."""
    with refusals(), Remote(url) as remote:
        for model in models:
            remote.delete(f"/models/{model}")
            typer.echo(json.dumps({"deleted": model}) if as_json else f"{model} is deleted")


def generate(
    model: ModelId,
    class_label: Annotated[
        list[str] | None, typer.Option("--class", help="name or number; by default every class")
    ] = None,
    n: Annotated[int | None, typer.Option(help="images; by default one for each class")] = None,
    steps: Annotated[int, typer.Option()] = 25,
    guidance_scale: Annotated[float, typer.Option(help="1 is unguided")] = 2.0,
    scheduler: Annotated[str, typer.Option(help="ddim, dpmsolver++ or euler")] = "ddim",
    seed: Annotated[int | None, typer.Option()] = None,
    out: Annotated[Path, typer.Option(help="directory for the PNGs")] = Path(),
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Sample images and save them as PNG."""
    stated: dict[str, Any] = {
        "model": model,
        "class_labels": class_label or None,
        "n": n,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
        "seed": seed,
    }
    with refusals(), Remote(url) as remote:
        body = {field: value for field, value in stated.items() if value is not None}
        asked = remote.post("/generate", body, prefer="respond-async")
        _follow_steps(remote, asked["id"], steps, quiet=as_json)
        done = remote.get(f"/generations/{asked['id']}")
        if done["status"] != "done":
            raise RemoteError(f"the generation {done['status']}: {done['error']}", REFUSED)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for image in done.pop("images"):
        file = out / f"{done['id']}-class{image['class_label']}-seed{image['seed']}.png"
        file.write_bytes(base64.b64decode(image["b64_png"]))
        files.append(str(file))
    typer.echo(json.dumps({**done, "files": files}) if as_json else "\n".join(files))


@contextlib.contextmanager
def _bar(what: str, *, quiet: bool) -> Iterator[tuple[Progress, Any]]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=quiet, transient=True) as bar:
        yield bar, bar.add_task(what, total=None)


def _watch(remote: Remote, model_id: str, *, quiet: bool) -> Answer:
    """Raises RemoteError when the model does not become ready."""
    with _bar("queued", quiet=quiet) as (bar, task):
        for name, data in remote.events(f"/models/{model_id}/events"):
            if name == "status":
                bar.update(task, description=data["status"], total=None)
            elif name == "progress":
                bar.update(task, completed=data["step"], total=data["steps"])
    model = remote.get(f"/models/{model_id}")
    if model["status"] != "ready":
        raise RemoteError(f"{model_id} is {model['status']}: {model['error'] or 'on request'}")
    return model


def _follow_steps(remote: Remote, generation_id: str, steps: int, *, quiet: bool) -> None:
    with _bar("sampling", quiet=quiet) as (bar, task):
        bar.update(task, total=steps)
        for name, data in remote.events(f"/generations/{generation_id}/events"):
            if name == "progress":
                bar.update(task, completed=data["step"], total=data["steps"])


def _figures(model: Answer) -> dict[str, str]:
    plan, cost = model["plan"], model["measured"] or model["plan"]["predicted"]
    return {
        "size": f"depth {plan['depth']}, rank {plan['rank']}",
        "memory": f"{cost['memory_bytes'] / 1e6:.1f} MB",
        "latency, p95": f"{cost['latency_p95_seconds'] * 1e3:.0f} ms",
        "revision": str(model["revision"]),
    }


def _show(model: Answer, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(model))
        return
    told = "measured" if model["measured"] else "predicted"
    typer.echo(f"{model['id']}  {model['name']}")
    typer.echo(f"  {model['status']}{': ' + model['error'] if model['error'] else ''}")
    for name, figure in _figures(model).items():
        note = f" ({told})" if name in ("memory", "latency, p95") else ""
        typer.echo(f"  {name}: {figure}{note}")
