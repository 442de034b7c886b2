import json
from pathlib import Path, PurePosixPath

import pytest

from learngenes.data.folders import ClassFolders, class_folders, listed_classes, walked
from learngenes.data.images import DataError


def found(*files: str, listed: dict[str, str] | None = None) -> ClassFolders:
    classes = None if listed is None else listed_classes(json.dumps(listed).encode())
    return class_folders([PurePosixPath(file) for file in files], classes)


def counts(folders: ClassFolders) -> dict[str, int]:
    labels = [*folders.labels.values()]
    return {name: labels.count(number) for number, name in enumerate(folders.class_names)}


def skipped(folders: ClassFolders) -> dict[str, int]:
    return {some.reason: some.count for some in folders.skipped}


@pytest.mark.parametrize("around", ["", "mine/", "my/own/"])
def test_folders_of_the_first_level_are_the_classes(around: str) -> None:
    names = ("cat/1.png", "cat/old/2.JPEG", "cat/old/older/3.webp", "dog/new/1.jfif")
    folders = found(*(around + name for name in names))
    assert counts(folders) == {"cat": 3, "dog": 1}
    assert folders.skipped == []


def test_one_class_is_the_folder_of_its_images() -> None:
    assert counts(found("mine/cat/1.png", "mine/cat/2.png")) == {"cat": 2}


def test_numbers_are_in_the_order_of_numbers() -> None:
    assert found(*(f"{i}/1.png" for i in range(12))).class_names == [str(i) for i in range(12)]
    assert found("10/1.png", "9/1.png", "x/1.png").class_names == ["10", "9", "x"]


def test_one_name_in_other_code_points_is_one_class() -> None:
    folders = found("caf\u00e9/1.png", "cafe\u0301/1.png", "the/1.png")
    assert counts(folders) == {"caf\u00e9": 2, "the": 1}
    listed = found("cafe\u0301/1.png", "b/1.png", listed={"caf\u00e9": "coffee", "b": "bread"})
    assert counts(listed) == {"coffee": 1, "bread": 1}


def test_of_splits_the_one_for_training_is_taken() -> None:
    images = ("train/cat/1.png", "train/dog/1.png", "test/cat/1.png", "val/dog/1.png")
    for around in ("", "mine/"):
        folders = found(*(around + image for image in images))
        assert counts(folders) == {"cat": 1, "dog": 1}
        assert skipped(folders) == {"of another split than that for training": 2}


@pytest.mark.parametrize(
    "files", [("train/1.png", "test/1.png"), ("test/cat/1.png", "val/dog/1.png")]
)
def test_splits_are_no_classes_unless_somebody_says_so(files: tuple[str, ...]) -> None:
    with pytest.raises(DataError, match="are splits of a data set, and no classes"):
        found(*files)


def test_splits_that_are_listed_are_classes() -> None:
    listed = {"train": "locomotive", "test": "exam"}
    assert counts(found("train/1.png", "test/1.png", listed=listed)) == {"locomotive": 1, "exam": 1}
    assert counts(found("train/1.png", "plane/1.png")) == {"plane": 1, "train": 1}


def test_labels_in_a_file_are_not_overlooked() -> None:
    with pytest.raises(DataError, match=r"'mine/metadata\.csv' may say what the images are"):
        found("mine/1.png", "mine/metadata.csv")
    folders = found("cat/1.png", "dog/1.png", "metadata.csv")
    assert skipped(folders) == {"no pictures": 1}


def test_what_is_skipped_is_told() -> None:
    folders = found(
        *("cat/1.png", "cat/2.heic", "cat/a.txt", "cat/.b.png", "__MACOSX/cat/c.png"),
        *(f"dog/{i}.png" for i in range(2)),
        *(f"dog/{i}.tif" for i in range(5)),
    )
    assert counts(folders) == {"cat": 1, "dog": 2}
    assert skipped(folders) == {"hidden": 2, "in a format that is not read": 6, "no pictures": 1}
    assert folders.skipped[1].examples == ("cat/2.heic", "dog/0.tif", "dog/1.tif")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["cat/1.png", "dog/1.heic"], "of the class 'dog' no picture can be read"),
        (["cat/1.png", "1.png"], r"'1\.png' is in no class's folder"),
        ([".mine/cat/1.png"], "that are not hidden"),
        (["cat/1.heic"], r"1 like 'cat/1\.heic': convert"),
        ([], "there are no images"),
    ],
)
def test_what_would_be_guessed_is_refused(files: list[str], message: str) -> None:
    with pytest.raises(DataError, match=message):
        found(*files)


def test_linked_folders_are_looked_into_once(tmp_path: Path) -> None:
    (tmp_path / "data" / "cat").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for file in ("data/cat/1.png", "elsewhere/2.png"):
        (tmp_path / file).touch()
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cat" / "round").symlink_to(tmp_path / "data")
    names = [str(file) for file in walked(tmp_path / "data")]
    assert names == ["cat/1.png", "dog/2.png"]


def test_links_that_lead_nowhere_are_no_files(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "1.png").touch()
    (tmp_path / "cat" / "2.png").symlink_to(tmp_path / "missing")
    assert [str(file) for file in walked(tmp_path)] == ["cat/1.png"]
