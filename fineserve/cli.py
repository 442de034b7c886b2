"""`fineserve`: every command; what needs torch is imported when it is asked for."""

import os
from pathlib import Path
from typing import Annotated

import typer

from fineserve.embedded import Embedded, EmbeddedError
from registry.logs import configure_logging
from registry.settings import get_settings

cli = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


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
    typer.echo(f"""
fineserve is ready: {embedded.url} (API: {embedded.url}/docs)

  curl -s {embedded.url}/models -H 'content-type: application/json' -d '{{"max_mem_gb": 4}}'
  curl -s {embedded.url}/generate -H 'content-type: application/json' -H 'accept: image/png' \\
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
def pretrain(
    config: Annotated[Path, typer.Argument(help="a TOML file, see configs/", exists=True)],
    work: Annotated[Path, typer.Option(help="checkpoints and the loss log; resumes from it")],
    family: Annotated[Path, typer.Option(help="where the family is written")],
) -> None:
    """Phase 1: train a family's learngenes. `accelerate launch -m fineserve` uses several GPUs."""
    from learngenes.publish import pretrain_family

    pretrain_family(config, work, family)


def _fail(error: Exception) -> None:
    typer.secho(str(error), err=True, fg="red")
    raise typer.Exit(1)


def main() -> None:
    cli()
