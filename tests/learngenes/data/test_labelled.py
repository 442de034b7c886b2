import gzip
import struct
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from learngenes.data.images import DataError
from learngenes.data.labelled import LabelledImages, load

PIXELS = np.arange(3 * 4 * 4, dtype=np.uint8).reshape(3, 4, 4)


def write_idx(directory: Path, name: str, array: np.ndarray) -> None:
    header = struct.pack(f">4B{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    (directory / f"{name}.gz").write_bytes(gzip.compress(header + array.tobytes()))


@pytest.fixture
def idx(tmp_path: Path) -> Path:
    for prefix in ("train", "t10k"):
        write_idx(tmp_path, f"{prefix}-images-idx3-ubyte", PIXELS)
        write_idx(tmp_path, f"{prefix}-labels-idx1-ubyte", np.array([1, 0, 1], np.uint8))
    return tmp_path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, grey in (("dark", 10), ("bright", 250)):
        (tmp_path / name).mkdir()
        Image.new("L", (6, 6), grey).save(tmp_path / name / "a.png")
    return tmp_path


def test_idx_files(idx: Path) -> None:
    data = load(idx, "train", ("a", "b"), 4)
    assert torch.equal(data.images[:, 0], torch.from_numpy(PIXELS))
    assert data.labels.tolist() == [1, 0, 1]
    assert data.class_names == ("a", "b")


def test_idx_files_that_do_not_fit_are_refused(idx: Path) -> None:
    with pytest.raises(DataError, match="images of"):
        load(idx, "train", ("a", "b"), 28)
    (idx / "t10k-labels-idx1-ubyte.gz").unlink()
    with pytest.raises(DataError, match="t10k-labels-idx1-ubyte"):
        load(idx, "test", ("a", "b"), 4)
    write_idx(idx, "train-labels-idx1-ubyte", np.array([1], np.uint8))
    with pytest.raises(DataError, match="3 images but 1 labels"):
        load(idx, "train", ("a", "b"), 4)
    path = idx / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-1]))
    with pytest.raises(DataError, match="not a whole IDX file"):
        load(idx, "train", ("a", "b"), 4)


def test_image_folder(folder: Path) -> None:
    data = load(folder, "train", (), 8)
    assert data.class_names == ("bright", "dark")
    assert data.images.shape == (2, 1, 8, 8)
    assert data.images.flatten(1).float().mean(1).tolist() == [250, 10]
    with pytest.raises(DataError, match="no folder 'test'"):
        load(folder, "test", (), 8)


def test_colour_anywhere_makes_the_folder_rgb_and_a_broken_image_is_named(folder: Path) -> None:
    Image.new("RGB", (6, 6), (255, 0, 0)).save(folder / "dark" / "b.png")
    assert load(folder, "train", (), 8).images.shape == (3, 3, 8, 8)
    (folder / "dark" / "b.png").write_text("not a picture")
    with pytest.raises(DataError, match=r"b\.png is not a readable PNG"):
        load(folder, "train", (), 8)


@pytest.mark.parametrize("path", ["", "missing"])
def test_nothing_to_read_is_an_error(tmp_path: Path, path: str) -> None:
    with pytest.raises(DataError, match=r"no images|does not exist"):
        load(tmp_path / path, "train", (), 8)


def test_hidden_files_and_folders_are_not_read(folder: Path) -> None:
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "dark" / "._a.png").write_text("of a Mac")
    data = load(folder, "train", (), 8)
    assert (data.class_names, len(data)) == (("bright", "dark"), 2)


def test_hugging_face_directory(tmp_path: Path) -> None:
    pictures = [Image.new("L", (8, 8), grey) for grey in (250, 10)]
    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dark", "bright"])}
    table = datasets.Dataset.from_dict(
        {"image": pictures, "label": [1, 0]}, features=datasets.Features(features)
    )
    table.save_to_disk(str(tmp_path / "single"))
    data = load(tmp_path / "single", "train", (), 8)
    assert data.class_names == ("dark", "bright")
    assert data.labels.tolist() == [1, 0]
    assert data.images[:, 0, 0, 0].tolist() == [250, 10]
    with pytest.raises(DataError, match="one split only"):
        load(tmp_path / "single", "test", (), 8)


def test_balanced_takes_as_many_of_each_class(limited_data: LabelledImages) -> None:
    balanced = limited_data.balanced(50)
    assert balanced.labels.bincount().tolist() == [10] * 5
    assert balanced.normalised(torch.tensor([0])).abs().max() <= 1
