"""Datasets of Hugging Face: rows with a class, or the call that makes them so."""

import io
import sys
from pathlib import Path

import datasets
import pytest
from datasets import ClassLabel, Features, List, Value
from PIL import Image

from learngenes.data.images import DataError
from learngenes.data.saved import is_saved, load_saved
from tests.support.archives import png

CLASSES = ClassLabel(names=["wolf", "cat"])
CATS = [{"bytes": png(10), "path": "a.png"}, {"bytes": png(20), "path": None}]
PICTURE = datasets.Image()
USABLE = {"image": PICTURE, "label": CLASSES}
TEXT, NUMBER = Value("string"), Value("int64")


def saved(directory: Path, features: dict[str, object], **columns: list[object]) -> Path:
    table = datasets.Dataset.from_dict(columns, features=Features(features))
    table.save_to_disk(str(directory / "mine"))
    return directory / "mine"


def test_rows_are_images_with_their_classes(tmp_path: Path) -> None:
    features = {"id": NUMBER, "label": CLASSES, "image": PICTURE}
    path = saved(tmp_path, features, id=[1, 2], label=[1, 0], image=CATS)
    assert is_saved(path)
    rows, names = load_saved(path)
    assert names == ["wolf", "cat"]
    assert [(image.size, label) for image, label in rows] == [((8, 8), 1), ((8, 8), 0)]
    rows, _ = load_saved(path, decode=False)
    assert [*rows] == [(png(10), 1), (png(20), 0)]


def test_of_splits_one_is_read(tmp_path: Path) -> None:
    columns = {"image": CATS, "label": [0, 1]}
    table = datasets.Dataset.from_dict(columns, features=Features(USABLE))
    datasets.DatasetDict({"train": table, "b": table}).save_to_disk(str(tmp_path))
    assert is_saved(tmp_path)
    assert len([*load_saved(tmp_path)[0]]) == 2
    with pytest.raises(DataError, match=r"has splits \['b', 'train'\], not 'test'; save the one"):
        load_saved(tmp_path, "test")


@pytest.mark.parametrize(
    ("features", "columns", "message"),
    [
        (
            {"id": TEXT, "image": PICTURE, "label": TEXT},
            {"id": ["a"], "image": CATS[:1], "label": ["cat"]},
            r'needs one ClassLabel column, it has id \(Value\), .*class_encode_column\("label"\)',
        ),
        (
            {"image": PICTURE, "label": NUMBER},
            {"image": CATS[:1], "label": [1]},
            r'cast_column\("label", datasets.ClassLabel\(names=',
        ),
        ({"image": PICTURE}, {"image": CATS}, "class_encode_column"),
        (
            {"images": List(PICTURE), "label": CLASSES},
            {"images": [CATS], "label": [0]},
            "'images' has several images a row",
        ),
        (
            {"image": TEXT, "label": CLASSES},
            {"image": ["a.png"], "label": [0]},
            r"cast_column\(.*datasets.Image",
        ),
        (
            {**USABLE, "size": CLASSES},
            {"image": CATS, "label": [0, 1], "size": [0, 1]},
            "drop all but one: `dataset.remove_columns",
        ),
        (USABLE, {"image": [], "label": []}, "is no dataset with rows"),
        (USABLE, {"image": CATS, "label": [0, None]}, "row 1 has no image or no class"),
        (USABLE, {"image": [CATS[0], None], "label": [0, 1]}, "row 1 has no image or no class"),
        (USABLE, {"image": CATS, "label": [0, -1]}, "row 1 is of class -1, which has no name"),
    ],
)
@pytest.mark.parametrize("decode", [True, False])
def test_what_lacks_images_or_classes_says_what_makes_them(
    tmp_path: Path,
    features: dict[str, object],
    columns: dict[str, list[object]],
    message: str,
    decode: bool,
) -> None:
    path = saved(tmp_path, features, **columns)
    with pytest.raises(DataError, match=message):
        list(load_saved(path, decode=decode)[0])


def test_half_a_dataset_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, USABLE, image=CATS, label=[0, 1])
    next(path.glob("*.arrow")).write_bytes(b"no rows")
    with pytest.raises(DataError, match="is no dataset with rows; save it again"):
        load_saved(path)


def test_sixteen_bit_pictures_are_decoded(tmp_path: Path) -> None:
    tiff = io.BytesIO()
    Image.new("I;16", (8, 8), 30000).save(tiff, "TIFF")
    path = saved(tmp_path, USABLE, image=[{"bytes": tiff.getvalue()}], label=[0])
    ((image, _),) = load_saved(path)[0]
    assert image.getpixel((0, 0)) == 30000


def test_without_the_library_it_is_said_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="`pip install datasets`"):
        load_saved(tmp_path)
