"""`fineserve up`, `down`, `logs`, `doctor` and `gc`, for the operator of a host.

What the server's packages bring is imported when it is asked for: the client has none of them.
"""

import os
import time
from typing import Annotated

import typer
from rich.console import Console

from fineserve.cli.options import AsJson, echo, fail
from registry.settings import get_settings

MARKS = {"ok": ("✓", "green"), "warning": ("!", "yellow"), "broken": ("✗", "red")}

cli = typer.Typer()


@cli.command()
def up() -> None:
    """Start Valkey, a build worker, a sample worker and the API, and wait until they are ready."""
    from fineserve.embedded import Embedded, EmbeddedError
    from registry.keys import Keys

    embedded, began = Embedded(get_settings()), time.monotonic()

    def done(what: str) -> None:
        console.print(f"  [green]✓[/] {what:50} {time.monotonic() - began:5.1f} s", highlight=False)

    console, still = Console(), list[str]()
    try:
        with console.status("starting") as line:
            embedded.start()
            done("programs are started")
            for missing in embedded.wait_ready():
                for what in still:
                    if what not in missing:
                        done(what)
                still = missing
                line.update(f"waiting for {', '.join(missing)} ({time.monotonic() - began:.0f} s)")
            for what in still:
                done(what)
    except EmbeddedError as error:
        fail(error)
    guarded = Keys(get_settings().resolved_keys_file).required
    key = ' -H "authorization: Bearer $FINESERVE_API_KEY"' if guarded else ""
    typer.echo(f"""
fineserve is ready: {embedded.url} (API: {embedded.url}/docs)

  curl -s {embedded.url}/models{key} -H 'content-type: application/json' -d '{{"max_mem_gb": 4}}'
  curl -s {embedded.url}/generate{key} -H 'content-type: application/json' -H 'accept: image/png' \\
       -d '{{"model": "ID FROM ABOVE", "n": 20}}' -o images.png

`fineserve logs` follows the logs, `fineserve down` stops everything.""")


@cli.command()
def down() -> None:
    """Stop everything that `up` started."""
    from fineserve.embedded import Embedded, EmbeddedError

    try:
        Embedded(get_settings()).stop()
    except EmbeddedError as error:
        fail(error)
    typer.echo("fineserve is down")


@cli.command()
def logs() -> None:
    """Follow the logs of everything that `up` started."""
    from fineserve.embedded import Embedded

    files = Embedded(get_settings()).logs()
    if not files:
        fail("there are no logs yet; `fineserve up` first")
    os.execvp("tail", ["tail", "-n", "50", "-F", *map(str, files)])  # noqa: S606, S607


@cli.command()
def doctor(as_json: AsJson = False) -> None:
    """Check this host, and say what to do where something is wrong; 1 when it cannot serve."""
    from fineserve.doctor import examine

    findings = []
    for finding in examine(get_settings()):
        findings.append(finding)
        if not as_json:
            mark, colour = MARKS[finding.verdict]
            typer.secho(f"{mark} {finding.check}: {finding.what}", fg=colour)
            if finding.advice:
                typer.echo(f"    {finding.advice}")
    if as_json:
        echo("", findings, as_json)
    if any(finding.verdict == "broken" for finding in findings):
        raise typer.Exit(1)


@cli.command()
def gc(
    older_than_hours: Annotated[
        float | None, typer.Option(min=0, help="by default FINESERVE_IMAGE_TTL_SECONDS")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Delete old images, exports and latents now, and what was never finished, as workers do.

    Models stay: `fineserve models delete` removes those.
    """
    from registry.store import open_store

    settings = get_settings()
    seconds = settings.image_ttl_seconds if older_than_hours is None else older_than_hours * 3600
    swept = open_store(settings).sweep(seconds)
    echo(f"{swept} deleted", {"deleted": swept}, as_json)
