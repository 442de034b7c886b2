"""`fineserve tasks …` against a real server."""

import json
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest

from fineserve.packing import packed
from tests.support.archives import PETS, png, unpacked, zipped
from tests.support.commands import made, run

NAMES = ["wolf / dog", "never seen", "cat"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return unpacked(PETS, tmp_path / "pets")


def created(url: str, path: Path, *options: str) -> dict[str, Any]:
    """Task that the command line makes of a path."""
    result = run("tasks", "create", str(path), "--json", "--url", url, *options)
    (task,) = json.loads(result.stdout)
    return task


def described(task: dict[str, Any]) -> tuple[object, ...]:
    return task["name"], task["class_names"], task["counts"]


def test_a_folder_becomes_a_model_of_its_classes(url: str, folder: Path, working: None) -> None:
    task = created(url, folder)
    assert described(task) == ("pets", ["cat", "dog"], [3, 3])
    model = made(url, "--task", task["id"])
    told = json.loads(run("models", "show", model, "--json", "--url", url).stdout)
    assert (told["status"], told["class_names"]) == ("ready", ["cat", "dog"])
    choice = ("--class", "dog", "--steps", "2", "--out", str(folder.parent))
    run("generate", model, *choice, "--url", url)


@pytest.mark.parametrize("where", [".", "cat/.."])
def test_a_folder_is_found_from_within(
    url: str, folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    monkeypatch.chdir(folder)
    assert created(url, Path(where))["class_names"] == ["cat", "dog"]


def test_a_folder_of_any_name_gives_one_that_a_task_may_have(url: str, folder: Path) -> None:
    strange = folder.rename(folder.with_name("pets & more (1)" + "x" * 80))
    assert created(url, strange)["name"] == ("pets - more -1-" + "x" * 80)[:64]


def dataset(**columns: object) -> datasets.Dataset:
    """Data set of four images."""
    images = [{"bytes": png(10 * i + 10)} for i in range(4)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict({"image": images, **columns}, datasets.Features(features))


def test_a_saved_dataset_becomes_its_classes_in_their_order(url: str, tmp_path: Path) -> None:
    dataset(label=[2, 0, 2, 0]).save_to_disk(str(tmp_path / "mine"))
    task = created(url, tmp_path / "mine", "--name", "hugging", "--family", "tiny")
    assert described(task) == ("hugging", ["wolf / dog", "cat"], [2, 2])


def test_the_training_split_of_a_dataset_is_sent(url: str, tmp_path: Path) -> None:
    train, test = dataset(label=[0, 0, 2, 2]), dataset(label=[1, 1, 1, 1])
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(str(tmp_path / "mine"))
    assert created(url, tmp_path / "mine")["class_names"] == ["wolf / dog", "cat"]


def test_a_dataset_without_classes_is_told_the_call_for_them(url: str, tmp_path: Path) -> None:
    labelled = dataset(label=[0, 1, 0, 1])
    for value, call in (("string", "class_encode_column"), ("int64", "cast_column")):
        labelled.cast_column("label", datasets.Value(value)).save_to_disk(str(tmp_path / value))
        result = run("tasks", "create", str(tmp_path / value), "--url", url, exit_code=1)
        assert result.stdout == ""
        assert f'`dataset.{call}("label"' in result.stderr


def test_a_packed_dataset_is_refused_with_the_command_for_it(url: str, tmp_path: Path) -> None:
    dataset(label=[0, 1, 0, 1]).save_to_disk(str(tmp_path / "mine"))
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        tar.add(tmp_path / "mine", "mine")
    result = run("tasks", "create", str(tmp_path / "mine.tar"), "--url", url, exit_code=1)
    assert "`fineserve tasks create FOLDER`" in result.stderr


def test_only_images_are_packed_and_links_as_what_they_lead_to(folder: Path) -> None:
    for name in ("notes.txt", ".hidden.png", "film.mp4"):
        (folder / "cat" / name).write_bytes(b"not to be sent")
    (folder / "dog" / "link.png").symlink_to(folder / "cat" / "0.png")
    with packed(folder) as (archive, skipped), tarfile.open(fileobj=archive) as tar:
        members = tar.getmembers()
    assert {some.reason: some.count for some in skipped} == {"hidden": 1, "no pictures": 2}
    names = {*PETS, "dog/link.png"}
    assert {member.name for member in members} == names
    assert all(member.isreg() for member in members)


def test_what_is_skipped_is_said_and_a_dry_run_keeps_nothing(
    url: str, folder: Path, tmp_path: Path
) -> None:
    (folder / "cat" / "old.heic").write_bytes(b"of a telephone")
    linked = folder.with_name(".pets")
    linked.mkdir()
    (linked / "cat").symlink_to(folder / "cat")
    told = run("tasks", "create", str(linked), "--dry-run", "--url", url)
    assert "cat (3)" in told.stdout
    assert "skipped, in a format that is not read: 1 (cat/old.heic)" in told.stderr
    assert json.loads(run("tasks", "list", "--json", "--url", url).stdout) == []


def test_names_are_shown_as_they_are(url: str, folder: Path) -> None:
    (folder / "cat").rename(folder / "cat [old] :smiley:")
    run("tasks", "create", str(folder), "--url", url)
    assert "cat [old] :smiley: (3)" in run("tasks", "list", "--url", url).stdout


def test_images_that_lie_in_the_folder_itself_are_of_one_class(url: str, folder: Path) -> None:
    assert described(created(url, folder / "cat")) == ("cat", ["cat"], [3])


def test_an_archive_becomes_a_task_that_is_listed_and_deleted(url: str, tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(zipped(PETS).getvalue())
    task = created(url, tmp_path / "pets.zip")
    listed = run("tasks", "list", "--url", url)
    assert "cat (3), dog (3)" in listed.stdout
    deleted = run("tasks", "delete", task["id"], "--url", url)
    assert deleted.stdout == f"{task['id']} is deleted\n"
    assert json.loads(run("tasks", "list", "--json", "--url", url).stdout) == []


@pytest.mark.parametrize(
    ("options", "messages"),
    [((), ("not a whole zip or tar", "no images")), (("--family", "none"), ("no family 'none'",))],
)
def test_a_refusal_is_said(
    url: str, tmp_path: Path, options: tuple[str, ...], messages: tuple[str, ...]
) -> None:
    folder = unpacked(PETS if options else {}, tmp_path / "empty")
    folder.mkdir(exist_ok=True)
    words = ("tasks", "create", str(folder), *options)
    told = run(*words, "--url", url, exit_code=1).stderr
    assert any(message in told for message in messages), told
