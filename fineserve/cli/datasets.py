"""`fineserve tasks …`: images of your own, that models can be retrained on."""

import re
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from fineserve.cli.connection import connected
from fineserve.cli.options import AsJson, Text, Url, echo_deleted, echo_table
from fineserve.wire import TaskResponse

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
    name: Text = None,
    family: Text = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="say what would be in it, and keep nothing")
    ] = False,
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Upload images; `fineserve models create --task ID` makes a model of them."""
    with connected(url) as client:
        task = client.create_task(
            images, name=name or _name(images), family=family, dry_run=dry_run
        )
        _show([task], as_json)
    if len(task.class_names) == 1:
        typer.secho(
            f"all of it is one class, {task.class_names[0]}; for more, put each class's images "
            "into a folder that is named after it",
            err=True,
            fg="yellow",
        )
    for some in task.skipped:
        examples = ", ".join(some.examples)
        typer.secho(f"skipped, {some.reason}: {some.count} ({examples})", err=True, fg="yellow")


@cli.command("list")
def list_tasks(as_json: AsJson = False, url: Url = None) -> None:
    """List uploads, newest first."""
    with connected(url) as client:
        _show(client.tasks(), as_json)


@cli.command()
def delete(
    tasks: Annotated[list[str], typer.Argument(help="ids")],
    as_json: AsJson = False,
    url: Url = None,
) -> None:
    """Remove uploads; models that were made of them stay."""
    with connected(url) as client:
        for task in tasks:
            client.delete_task(task)
            echo_deleted(task, as_json)


def _name(images: Path) -> str:
    """Name of a folder or archive, in characters that the service takes."""
    path = images.resolve()
    return re.sub(r"[^\w .-]", "-", path.name if path.is_dir() else path.stem)[:64] or "images"


def _show(tasks: list[TaskResponse], as_json: bool) -> None:
    table = Table("id", "name", "family", "images", "classes")
    for task in tasks:
        counted = zip(task.class_names, task.counts, strict=True)
        classes = ", ".join(f"{name} ({count})" for name, count in counted)
        table.add_row(task.id, task.name, task.family, str(sum(task.counts)), classes)
    echo_table(table, tasks, as_json)
