"""`fineserve tasks …`: images of your own, that models can be retrained on."""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import IO, Annotated

import typer
from rich.console import Console
from rich.table import Table

from fineserve.models import AsJson, Url, refusals
from fineserve.remote import Answer, Remote, RemoteError
from learngenes.config import NetworkConfig

cli = typer.Typer(
    no_args_is_help=True, help="Upload images of other classes, list and delete them."
)

HUGGING_FACE = ("dataset_dict.json", "state.json")


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
    with refusals(), Remote(url) as remote, tempfile.TemporaryFile() as packed:
        if images.is_dir():
            _pack(images, packed, remote, family)
            task = remote.upload("/tasks", packed, name=name or images.name, family=family)
        else:
            with images.open("rb") as archive:
                task = remote.upload("/tasks", archive, name=name or images.stem, family=family)
        _show([task], as_json)


def _pack(directory: Path, into: IO[bytes], remote: Remote, family: str | None) -> None:
    with tarfile.open(fileobj=into, mode="w") as tar:
        if any((directory / file).exists() for file in HUGGING_FACE):
            _add_dataset(directory, tar, _image_size(remote, family))
        else:
            for path in sorted(directory.rglob("*")):
                if path.is_file():
                    tar.add(path, path.relative_to(directory.parent))
    into.seek(0)


def _image_size(remote: Remote, family: str | None) -> int:
    families = remote.get("/families")["families"]
    chosen = [f for f in families if family in (None, f["name"])]
    if not chosen:
        raise RemoteError(
            f"no family {family!r}; there is {', '.join(f['name'] for f in families)}"
        )
    return max(NetworkConfig.model_validate(f["network"]).image_size for f in chosen)


def _add_dataset(directory: Path, tar: tarfile.TarFile, side: int) -> None:
    """Raises RemoteError when it cannot be read."""
    from PIL import Image

    from learngenes.data import DataError, load

    try:
        data = load(directory, "train", (), side)
    except DataError as error:
        raise RemoteError(str(error)) from error
    for index, (pixels, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
        channels_last = pixels.permute(1, 2, 0).numpy()
        picture = io.BytesIO()
        Image.fromarray(channels_last.squeeze(2) if len(pixels) == 1 else channels_last).save(
            picture, "PNG"
        )
        folder = data.class_names[label].replace("/", "-")
        member = tarfile.TarInfo(f"{folder}/{index}.png")
        member.size = picture.tell()
        picture.seek(0)
        tar.addfile(member, picture)


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
