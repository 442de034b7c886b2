"""`fineserve`: every command; what needs torch is imported when it is asked for."""

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console

from fineserve.cli import datasets, keys, models
from fineserve.cli import plan as planning
from fineserve.doctor import examine
from fineserve.embedded import Embedded, EmbeddedError
from fineserve.remote import Remote
from registry.keys import Keys
from registry.logs import configure_logging
from registry.settings import get_settings
from registry.store import ArtifactStore

if TYPE_CHECKING:
    from worker.runtime import Runtime

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "broken": ("✗", "red")}

cli = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False)
cli.add_typer(models.cli, name="models")
cli.add_typer(datasets.cli, name="tasks")
cli.add_typer(keys.cli, name="keys")
cli.command()(models.generate)


@cli.callback()
def fineserve() -> None:
    """On-demand model sizing: send a budget, get a diffusion transformer that fits it."""
    configure_logging("console")


@cli.command()
def up() -> None:
    """Start Valkey, a build worker, a sample worker and the API, and wait until they are ready."""
    embedded = Embedded(get_settings())
    said = ""
    try:
        embedded.start()
        for missing in embedded.wait_ready():
            if missing != said:
                typer.echo(f"  {missing}")
                said = missing
    except EmbeddedError as error:
        _fail(error)
    guarded = Keys(get_settings().resolved_keys_file).required
    key = ' -H "authorization: Bearer $FINESERVE_API_KEY"' if guarded else ""
    typer.echo(f"""
fineserve is ready: {embedded.url} (API: {embedded.url}/docs)

  curl -s {embedded.url}/models{key} -H 'content-type: application/json' -d '{{"max_mem_gb": 4}}'
  curl -s {embedded.url}/generate{key} -H 'content-type: application/json' -H 'accept: image/png' \\
       -d '{{"model": "ID FROM ABOVE", "n": 20}}' -o images.png

make logs follows the logs, make down stops everything.""")


@cli.command()
def down() -> None:
    """Stop everything that `up` started."""
    try:
        Embedded(get_settings()).stop()
    except EmbeddedError as error:
        _fail(error)
    typer.echo("fineserve is down")


@cli.command()
def logs() -> None:
    """Follow the logs of everything that `up` started."""
    files = Embedded(get_settings()).logs()
    if not files:
        _fail(EmbeddedError("there are no logs yet; `make up` first"))
    os.execvp("tail", ["tail", "-n", "50", "-F", *map(str, files)])  # noqa: S606, S607


@cli.command()
def doctor(as_json: models.AsJson = False) -> None:
    """Check this host, and say what to do where something is wrong; 1 when it cannot serve."""
    findings = []
    for finding in examine(get_settings()):
        findings.append(finding)
        if not as_json:
            mark, colour = MARKS[finding.verdict]
            typer.secho(f"{mark} {finding.check}: {finding.what}", fg=colour)
            if finding.advice:
                typer.echo(f"    {finding.advice}")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(finding) for finding in findings]))
    if any(finding.verdict == "broken" for finding in findings):
        raise typer.Exit(1)


@cli.command()
def gc(
    older_than_hours: Annotated[
        float | None, typer.Option(min=0, help="by default FINESERVE_IMAGE_TTL_SECONDS")
    ] = None,
    as_json: models.AsJson = False,
) -> None:
    """Delete old images, exports and latents now, and what was never finished, as workers do.

    Models stay: `fineserve models delete` removes those.
    """
    settings = get_settings()
    seconds = settings.image_ttl_seconds if older_than_hours is None else older_than_hours * 3600
    swept = ArtifactStore(settings.resolved_store_dir).sweep(seconds)
    typer.echo(json.dumps({"deleted": swept}) if as_json else f"{swept} deleted")


@cli.command()
def plan(
    max_mem_gb: Annotated[float | None, typer.Option(help="of 10^9 bytes")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="95th percentile of a batch")] = None,
    family: Annotated[str | None, typer.Option(help="by default the service's")] = None,
    mem_scope: Annotated[str | None, typer.Option(help="model or process")] = None,
    min_quality: Annotated[float | None, typer.Option(help="of the family's best, 1")] = None,
    n: Annotated[int | None, typer.Option(help="images in one batch")] = None,
    num_inference_steps: Annotated[int | None, typer.Option()] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="1 is unguided")] = None,
    depth: Annotated[int | None, typer.Option()] = None,
    rank: Annotated[int | None, typer.Option()] = None,
    mode: Annotated[str | None, typer.Option(help="factored or materialised")] = None,
    dtype: Annotated[str | None, typer.Option(help="float32, bfloat16 or int8")] = None,
    device_class: Annotated[str | None, typer.Option()] = None,
    plot: Annotated[Path | None, typer.Option(help="draw the Pareto front into this file")] = None,
    as_json: models.AsJson = False,
    url: Annotated[str | None, typer.Option(help="of the service; by default this host's")] = None,
) -> None:
    """What a budget would give, without making it: the plan and its neighbours on the front."""
    stated = {
        "max_mem_gb": max_mem_gb,
        "max_latency_ms": max_latency_ms,
        "family": family,
        "mem_scope": mem_scope,
        "min_quality": min_quality,
        "n": n,
        "num_inference_steps": num_inference_steps,
        "guidance_scale": guidance_scale,
        "depth": depth,
        "rank": rank,
        "mode": mode,
        "dtype": dtype,
        "device_class": device_class,
    }
    request = {name: value for name, value in stated.items() if value is not None}
    try:
        with models.refusals(), Remote(url) as remote:
            answer = remote.post("/plan", request)
        if as_json:
            typer.echo(json.dumps(answer))
        else:
            Console(width=None if sys.stdout.isatty() else 120).print(planning.table(answer))
            typer.echo(planning.explanation(answer))
        if plot is not None:
            planning.draw(answer, request, plot)
            typer.echo(f"the Pareto front is drawn in {plot}", err=as_json)
    except planning.PlanError as error:
        _fail(error)


@cli.command()
def profile(
    family: Annotated[str | None, typer.Option(help="by default every calibrated one")] = None,
) -> None:
    """Measure this device, and keep the result in Redis for the solver; under a minute a family."""
    import redis

    from learngenes.family.family import FamilyError
    from worker.runtime import Runtime

    try:
        runtime = Runtime.start(get_settings())
        runtime.announce_families()
        names = [family] if family else [n for n, f in runtime.families.items() if f.quality]
        for name in names:
            _profile(runtime, name)
    except (FamilyError, LookupError) as error:
        _fail(error)
    except redis.RedisError as error:
        _fail(EmbeddedError(f"Redis cannot be reached ({error}); `make up` first"))
    if not names:
        _fail(EmbeddedError("no family is calibrated; `fineserve calibrate` one first"))


def _profile(runtime: "Runtime", family: str) -> None:
    from tqdm import tqdm

    from worker.build.profiles import refresh_profile

    with tqdm(total=1.0, bar_format="{desc:40} {percentage:3.0f}% |{bar}| {elapsed}") as bar:

        def on_progress(share: float, what: str) -> None:
            bar.set_description_str(f"{family}: {what}", refresh=False)
            bar.update(share - bar.n)

        profile = refresh_profile(runtime, family, on_progress)
    runtime.repository.forget_step_costs(runtime.device_class, family)
    typer.echo(f"{family} on {profile.device_class}, torch {profile.torch_version}: stored")


@cli.command()
def previews(
    family: Annotated[Path, typer.Argument(help="a family's directory", exists=True)],
) -> None:
    """Sample every class at every size of a family, for the page; a minute or two."""
    from tqdm import tqdm

    from learngenes.device import default_device
    from learngenes.family.family import FamilyError, load_family
    from learngenes.family.previews import write_previews

    try:
        loaded = load_family(family).to(default_device())
    except FamilyError as error:
        _fail(error)
    with tqdm(unit=" sizes") as bar:

        def on_size(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        file = write_previews(loaded, family, on_size)
    typer.echo(f"{file} is written")


@cli.command()
def calibrate(
    family: Annotated[Path, typer.Argument(help="a family's directory", exists=True)],
    points: Annotated[int, typer.Option(min=2, help="at most, of depths and of ranks")] = 4,
    steps: Annotated[int, typer.Option(min=1, help="of Sigma retraining, for each size")] = 300,
) -> None:
    """Measure what each size of a family is worth, and store it there; minutes to an hour."""
    from tqdm import tqdm

    from learngenes.config import Size
    from learngenes.device import default_device
    from learngenes.family.family import FamilyError, load_family, write_quality
    from learngenes.training.calibrate import calibrate as measure
    from learngenes.training.retrain import RetrainingConfig

    try:
        loaded = load_family(family).to(default_device())
    except FamilyError as error:
        _fail(error)
    with tqdm(total=0, unit="size") as bar:

        def on_size(done: int, total: int, size: Size, before: float, after: float) -> None:
            bar.total = total
            bar.set_description(f"L{size.depth} r{size.rank}: {before:.4f} -> {after:.4f}")
            bar.update(done - bar.n)

        config = RetrainingConfig(steps=steps, max_seconds=float("inf"))
        table = measure(loaded, config, points, on_size)
    write_quality(family, table)
    typer.echo(f"{family}/quality.json is written; restart its workers")


@cli.command()
def synthesise(
    directory: Annotated[Path, typer.Argument(help="where; its last part is the family's name")],
) -> None:
    """A family of random weights with the shapes of DiT-XL/2 at 256 x 256, to try sizing on."""
    from learngenes.family.synthetic import write_synthetic_family

    if directory.exists():
        _fail(EmbeddedError(f"{directory} exists; choose another name, or remove it"))
    write_synthetic_family(directory)
    typer.echo(f"{directory} is written; FINESERVE_FAMILIES_DIR={directory.parent} make up")


@cli.command()
def pretrain(
    config: Annotated[Path, typer.Argument(help="see families/*/config.toml", exists=True)],
    work: Annotated[Path, typer.Option(help="checkpoints and the loss log; resumes from it")],
    family: Annotated[Path, typer.Option(help="where the family is written")],
    start: Annotated[Path | None, typer.Option(help="a family to go on with")] = None,
) -> None:
    """Phase 1: train a family's learngenes. `accelerate launch -m fineserve` uses several GPUs."""
    from learngenes.config import ConfigError
    from learngenes.data.images import DataError
    from learngenes.data.latents import AutoencoderError
    from learngenes.family.family import FamilyError
    from learngenes.training.config import TrainingError
    from learngenes.training.new_family import pretrain_family

    try:
        pretrain_family(config, work, family, start)
    except (AutoencoderError, ConfigError, DataError, FamilyError, TrainingError) as error:
        _fail(error)


@cli.command()
def condense(
    teacher: Annotated[str, typer.Argument(help="a DiT's directory, or a hub's name")],
    config: Annotated[Path, typer.Argument(help="see families/*/config.toml", exists=True)],
    work: Annotated[Path, typer.Option(help="checkpoints and the loss log; resumes from it")],
    family: Annotated[Path, typer.Option(help="where the family is written")],
) -> None:
    """A family from a DiT of diffusers: factors fitted to its weights, then distillation."""
    if importlib.util.find_spec("tensorly") is None:
        _fail(
            EmbeddedError(
                "TensorLy is missing: `pip install --constraint requirements.lock '.[condense]'`"
            )
        )
    from learngenes.config import ConfigError
    from learngenes.data.images import DataError
    from learngenes.data.latents import AutoencoderError
    from learngenes.family.family import FamilyError
    from learngenes.formats.teacher import TeacherError
    from learngenes.training.condense import REPORT
    from learngenes.training.condense import condense as make
    from learngenes.training.config import TrainingError

    try:
        make(teacher, config, work, family)
    except (
        AutoencoderError,
        ConfigError,
        DataError,
        FamilyError,
        TeacherError,
        TrainingError,
    ) as error:
        _fail(error)
    typer.echo((family / REPORT).read_text())


def _fail(error: Exception) -> NoReturn:
    typer.secho(str(error), err=True, fg="red")
    raise typer.Exit(1)


def main() -> None:
    cli()
