"""`fineserve tasks …`: images of your own, that models can be retrained on."""

import json
import re
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fineserve.cli.models import AsJson, Url, refusals
from fineserve.packing import packed
from fineserve.remote import Answer, Remote

cli = typer.Typer(
    no_args_is_help=True, help="Upload images of other classes, list and delete them."
)


@cli.command()
def create(
    images: Annotated[
        Path,
        typer.Argument(
            help="a folder of class folders, a zip or tar of one, or what `datasets` has saved",
            exists=True,
        ),
    ],
    name: Annotated[str | None, typer.Option()] = None,
    family: Annotated[str | None, typer.Option()] = None,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Upload images; `fineserve models create --task ID` makes a model of them."""
    with refusals(), Remote(url) as remote, packed(images) as archive:
        chosen = name or _name(images)
        _show([remote.upload("/tasks", archive, name=chosen, family=family)], as_json)


@cli.command("list")
def list_tasks(as_json: AsJson = False, url: Url = None) -> None:
    """Newest first."""
    with refusals(), Remote(url) as remote:
        _show(remote.get("/tasks")["tasks"], as_json)


@cli.command()
def delete(
    tasks: Annotated[list[str], typer.Argument(help="ids")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Remove uploads; models that were made of them stay."""
    with refusals(), Remote(url) as remote:
        for task in tasks:
            remote.delete(f"/tasks/{task}")
            typer.echo(json.dumps({"deleted": task}) if as_json else f"{task} is deleted")


def _name(images: Path) -> str:
    """Of what lies there, as the service takes it."""
    path = images.resolve()
    return re.sub(r"[^\w .-]", "-", path.name if path.is_dir() else path.stem)[:64]


def _show(tasks: list[Answer], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(tasks))
        return
    table = Table("id", "name", "family", "images", "classes")
    for task in tasks:
        counted = zip(task["class_names"], task["counts"], strict=True)
        classes = ", ".join(f"{name} ({count})" for name, count in counted)
        table.add_row(task["id"], task["name"], task["family"], str(sum(task["counts"])), classes)
    Console(width=None if Console().is_terminal else 160).print(table)
