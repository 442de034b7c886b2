"""Options that several commands share, and their output."""

from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.table import Table

REFUSED, UNREACHABLE = 1, 3
"""Exit codes; 2 is a wrong command line."""
WIDTH = 160
"""Columns of a table that is written into a file."""

Url = Annotated[str | None, typer.Option(help="of the service; by default this host's")]
AsJson = Annotated[bool, typer.Option("--json", help="the service's answer, for scripts")]
ModelId = Annotated[str, typer.Argument(help="as `fineserve models list` shows it")]

MaxMemGb = Annotated[float | None, typer.Option(help="of 10^9 bytes")]
MaxLatencyMs = Annotated[float | None, typer.Option(help="of one batch")]
Percentile = Annotated[
    int | None, typer.Option(help="that --max-latency-ms is of: 50 or 95, by default 95")
]
FamilyName = Annotated[str | None, typer.Option(help="by default the service's")]
BatchImages = Annotated[int | None, typer.Option(help="images in one batch")]
Text = Annotated[str | None, typer.Option()]
Number = Annotated[int | None, typer.Option()]

SchedulerName = Annotated[str | None, typer.Option(help="ddim, dpmsolver++ or euler")]
GuidanceScale = Annotated[float | None, typer.Option(help="1 is unguided")]
GuidanceStart = Annotated[float | None, typer.Option(help="share of the steps, 0 by default")]
GuidanceStop = Annotated[float | None, typer.Option(help="share of the steps, 1 by default")]
GuideSize = Annotated[
    str | None, typer.Option(help="smaller size that guides, as DEPTHxRANK; by default the model")
]

FamilyDirectory = Annotated[Path, typer.Argument(help="a family's directory", exists=True)]
FamilyConfig = Annotated[Path, typer.Argument(help="see families/*/config.toml", exists=True)]
Work = Annotated[Path, typer.Option(help="checkpoints and the loss log; resumes from it")]
NewFamily = Annotated[Path, typer.Option(help="where the family is written")]


def given(**options: Any) -> dict[str, Any]:
    """Options that were given; the service chooses the others."""
    return {name: value for name, value in options.items() if value is not None}


def parsed_guide(text: str | None) -> dict[str, int] | None:
    """A size that is written as DEPTHxRANK. Raises BadParameter."""
    if text is None:
        return None
    depth, _, rank = text.partition("x")
    if not (depth.isdecimal() and rank.isdecimal()):
        raise typer.BadParameter(f"--guide {text!r} is no DEPTHxRANK; 2x96 is one")
    return {"depth": int(depth), "rank": int(rank)}


def echo(text: object, answer: object, as_json: bool) -> None:
    """Write text for people, or an answer for scripts."""
    typer.echo(to_json(answer).decode() if as_json else text)


def echo_deleted(record_id: str, as_json: bool) -> None:
    echo(f"{record_id} is deleted", {"deleted": record_id}, as_json)


def echo_table(table: Table, answer: object, as_json: bool) -> None:
    if as_json:
        echo("", answer, as_json)
    else:
        width = None if Console().is_terminal else WIDTH
        Console(width=width, markup=False, emoji=False).print(table)  # names are as they are


def fail(error: object, code: int = REFUSED) -> NoReturn:
    typer.secho(str(error), err=True, fg="red")
    raise typer.Exit(code)
