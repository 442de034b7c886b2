"""`fineserve tasks …` against a real server."""

import json
import tarfile
from pathlib import Path

import pytest

from fineserve.packing import packed
from tests.fineserve.cli.test_models import alive, made, run
from tests.service.uploads.test_archives import Files, png, saved, zipped

__all__ = ["alive"]

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


def test_what_datasets_has_saved(url: str, tmp_path: Path) -> None:
    saved(tmp_path)
    task = created(url, tmp_path / "mine", "--name", "hugging", "--family", "tiny")
    assert (task["name"], task["class_names"], task["counts"]) == (
        "hugging",
        ["cat", "dog / wolf"],
        [2, 2],
    )


def test_of_a_datasets_splits_the_training_one_is_sent(tmp_path: Path) -> None:
    saved(tmp_path, ("test", "train"))
    (tmp_path / "elsewhere").write_bytes(b"linked")
    (tmp_path / "mine" / "train" / "link").symlink_to(tmp_path / "elsewhere")
    with packed(tmp_path / "mine") as archive, tarfile.open(fileobj=archive) as tar:
        assert {Path(member.name).parent.name for member in tar} == {"train"}
        assert all(member.isreg() for member in tar)


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
