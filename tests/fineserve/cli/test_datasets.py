"""`fineserve tasks …` against a real server."""

import json
import tarfile
from pathlib import Path

import datasets
import pytest

from fineserve.packing import packed
from tests.fineserve.cli.test_models import alive, made, run
from tests.support.archives import Files, png, zipped

__all__ = ["alive"]

NAMES = ["wolf / dog", "never seen", "cat"]
FILES: Files = {f"{name}/{i}.png": png(50 * i + 20) for name in ("cat", "dog") for i in range(3)}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in FILES.items():
        path = tmp_path / "pets" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "pets"


def created(url: str, path: Path, *options: str) -> dict[str, object]:
    result = run(url, "tasks", "create", str(path), "--json", *options)
    assert result.exit_code == 0, result.output
    (task,) = json.loads(result.stdout)
    return dict(task)


def test_a_folder_becomes_a_model_of_its_classes(url: str, folder: Path, working: None) -> None:
    task = created(url, folder)
    assert (task["name"], task["class_names"], task["counts"]) == ("pets", ["cat", "dog"], [3, 3])
    model = made(url, "--task", str(task["id"]))
    told = json.loads(run(url, "models", "show", model, "--json").stdout)
    assert (told["status"], told["class_names"]) == ("ready", ["cat", "dog"])
    sampled = run(
        url, "generate", model, "--class", "dog", "--steps", "2", "--out", str(folder.parent)
    )
    assert sampled.exit_code == 0, sampled.output


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
    """Four rows."""
    images = [{"bytes": png(10 * i + 10)} for i in range(4)]
    features = {"image": datasets.Image()} | {"label": datasets.ClassLabel(names=NAMES)}
    return datasets.Dataset.from_dict({"image": images, **columns}, datasets.Features(features))


def test_a_saved_dataset_becomes_its_classes_in_their_order(url: str, tmp_path: Path) -> None:
    dataset(label=[2, 0, 2, 0]).save_to_disk(str(tmp_path / "mine"))
    task = created(url, tmp_path / "mine", "--name", "hugging", "--family", "tiny")
    assert (task["name"], task["class_names"], task["counts"]) == (
        "hugging",
        ["wolf / dog", "cat"],
        [2, 2],
    )


def test_of_a_datasets_splits_the_training_one_is_sent(url: str, tmp_path: Path) -> None:
    train, test = dataset(label=[0, 0, 2, 2]), dataset(label=[1, 1, 1, 1])
    datasets.DatasetDict({"test": test, "train": train}).save_to_disk(str(tmp_path / "mine"))
    assert created(url, tmp_path / "mine")["class_names"] == ["wolf / dog", "cat"]


def test_a_dataset_without_classes_is_refused_with_the_call_that_makes_them(
    url: str, tmp_path: Path
) -> None:
    labelled = dataset(label=[0, 1, 0, 1])
    for value, call in (("string", "class_encode_column"), ("int64", "cast_column")):
        labelled.cast_column("label", datasets.Value(value)).save_to_disk(str(tmp_path / value))
        result = run(url, "tasks", "create", str(tmp_path / value))
        assert (result.exit_code, result.stdout) == (1, "")
        assert f'`dataset.{call}("label"' in result.stderr


def test_a_packed_dataset_is_refused_with_the_command_that_sends_it(
    url: str, tmp_path: Path
) -> None:
    dataset(label=[0, 1, 0, 1]).save_to_disk(str(tmp_path / "mine"))
    with tarfile.open(tmp_path / "mine.tar", "w") as tar:
        tar.add(tmp_path / "mine", "mine")
    result = run(url, "tasks", "create", str(tmp_path / "mine.tar"))
    assert result.exit_code == 1
    assert "`fineserve tasks create FOLDER`" in result.stderr


def test_only_images_are_packed_and_links_as_what_they_lead_to(folder: Path) -> None:
    for name in ("notes.txt", ".hidden.png", "film.mp4"):
        (folder / "cat" / name).write_bytes(b"not to be sent")
    (folder / "dog" / "link.png").symlink_to(folder / "cat" / "0.png")
    with packed(folder) as archive, tarfile.open(fileobj=archive) as tar:
        members = tar.getmembers()
    assert {member.name for member in members} == {
        f"pets/{name}" for name in (*FILES, "dog/link.png")
    }
    assert all(member.isreg() for member in members)


def test_an_archive_and_a_list_of_all(url: str, tmp_path: Path) -> None:
    (tmp_path / "pets.zip").write_bytes(zipped(FILES).getvalue())
    task = created(url, tmp_path / "pets.zip")
    listed = run(url, "tasks", "list")
    assert "cat (3), dog (3)" in listed.stdout
    deleted = run(url, "tasks", "delete", str(task["id"]))
    assert deleted.stdout == f"{task['id']} is deleted\n"
    assert json.loads(run(url, "tasks", "list", "--json").stdout) == []


def test_refusals(url: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((str(tmp_path / "empty"),), "not a whole zip or tar|no images"),
        ((str(tmp_path / "empty"), "--family", "none"), "no family 'none'"),
    ):
        result = run(url, "tasks", "create", *words)
        assert result.exit_code == 1
        assert any(part in result.stderr for part in message.split("|")), result.stderr
