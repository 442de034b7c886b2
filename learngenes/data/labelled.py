"""Labelled images from IDX files, an image folder, or a Hugging Face `datasets` directory."""

import gzip
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from learngenes.data.images import as_shown

IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}


class DataError(ValueError):
    """The data cannot be read; the message says where and why."""


@dataclass(frozen=True)
class LabelledImages:
    """images: uint8 (N, C, H, W), or latents in float16; labels: int64 (N,), indices into
    class_names."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalised(self, indices: Tensor) -> Tensor:
        """Chosen images as float32 in [-1, 1]; latents as they are."""
        chosen = self.images[indices].float()
        return chosen / 127.5 - 1 if self.images.dtype == torch.uint8 else chosen

    def subset(self, indices: Tensor) -> "LabelledImages":
        return LabelledImages(self.images[indices], self.labels[indices], self.class_names)

    def balanced(self, count: int) -> "LabelledImages":
        """The first count / num_classes images of each class, class after class."""
        each = count // len(self.class_names)
        picks = [
            torch.nonzero(self.labels == label).flatten()[:each]
            for label in range(len(self.class_names))
        ]
        return self.subset(torch.cat(picks))


def load(path: Path, split: str, class_names: Sequence[str], sample_size: int) -> LabelledImages:
    """Read `split` ("train" or "test") of the data at `path`, whichever of the three forms it has.

    `class_names` is used where the files carry only numbers. Images are resized to
    `sample_size` and kept in their own number of channels. Raises DataError.
    """
    if not path.is_dir():
        raise DataError(f"no data at {path}: the directory does not exist")
    if list(path.glob("*-idx3-ubyte*")):
        data = _load_idx(path, split, class_names)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        data = _load_hugging_face(path, split, sample_size)
    else:
        data = _load_folder(_split_folder(path, split), sample_size)
    if tuple(data.images.shape[2:]) != (sample_size, sample_size):
        raise DataError(f"{path} has images of {tuple(data.images.shape[2:])}, not {sample_size}")
    return data


def _load_idx(path: Path, split: str, class_names: Sequence[str]) -> LabelledImages:
    prefix = {"train": "train", "test": "t10k"}[split]
    images, labels = (
        torch.from_numpy(_read_idx(path, f"{prefix}-{name}-ubyte"))
        for name in ("images-idx3", "labels-idx1")
    )
    if len(images) != len(labels):
        raise DataError(f"{path} has {len(images)} images but {len(labels)} labels")
    return LabelledImages(images[:, None], labels.long(), tuple(class_names))


def _read_idx(path: Path, name: str) -> np.ndarray:
    """One file of Yann LeCun's IDX format: big-endian magic, dimensions, bytes."""
    file = next((p for p in (path / name, path / f"{name}.gz") if p.exists()), None)
    if file is None:
        raise DataError(f"{path / name}[.gz] is missing")
    raw = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    dimensions = raw[3]
    shape = struct.unpack(f">{dimensions}I", raw[4 : 4 + 4 * dimensions])
    body = np.frombuffer(raw, np.uint8, offset=4 + 4 * dimensions)
    if raw[2] != 8 or body.size != np.prod(shape):
        raise DataError(f"{file} is not a whole IDX file of bytes")
    return body.reshape(shape).copy()


def _split_folder(path: Path, split: str) -> Path:
    if (path / split).is_dir():
        return path / split
    if split != "train":
        raise DataError(f"{path} has no folder {split!r}: held-out images need one of their own")
    return path


def _load_folder(path: Path, sample_size: int) -> LabelledImages:
    """One sub-folder per class, named after it."""
    class_names = sorted(p.name for p in path.iterdir() if p.is_dir())
    files = [
        (file, label)
        for label, name in enumerate(class_names)
        for file in sorted((path / name).iterdir())
        if file.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        raise DataError(f"{path} has no images in class folders ({', '.join(IMAGE_SUFFIXES)})")

    def pictures() -> Iterator[Image.Image]:
        for file, _ in files:
            try:
                with Image.open(file) as picture:
                    picture.load()
                    yield picture
            except OSError as error:
                raise DataError(f"{file} is not a readable image: {error}") from error

    return _stack(pictures(), [label for _, label in files], class_names, sample_size)


def _load_hugging_face(path: Path, split: str, sample_size: int) -> LabelledImages:
    try:
        import datasets
    except ImportError as error:
        raise DataError(
            f"{path} is a Hugging Face dataset; `pip install datasets` to read it"
        ) from error
    loaded = datasets.load_from_disk(str(path))
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise DataError(f"{path} has splits {sorted(loaded)}, not {split!r}")
        loaded = loaded[split]
    elif split != "train":
        raise DataError(f"{path} is one split only: held-out images need a DatasetDict")
    kinds = [(type(feature).__name__, name) for name, feature in loaded.features.items()]
    images, labels = ([n for kind, n in kinds if kind == k] for k in ("Image", "ClassLabel"))
    if len(images) != 1 or len(labels) != 1:
        raise DataError(
            f"{path} needs one Image and one ClassLabel column, it has "
            + ", ".join(f"{name} ({kind})" for kind, name in kinds)
        )
    (image_column,), (label_column,) = images, labels
    class_names = loaded.features[label_column].names
    return _stack(loaded[image_column], loaded[label_column], class_names, sample_size)


def _stack(
    pictures: Iterable[Image.Image],
    labels: Sequence[int],
    class_names: Sequence[str],
    sample_size: int,
) -> LabelledImages:
    """Grey pictures give one channel, anything else RGB."""
    small = [_small(picture, sample_size) for picture in pictures]
    mode = "L" if all(picture.mode == "L" for picture in small) else "RGB"
    arrays = [np.asarray(picture.convert(mode), np.uint8) for picture in small]
    images = torch.from_numpy(np.stack(arrays).reshape(len(arrays), sample_size, sample_size, -1))
    return LabelledImages(
        images.permute(0, 3, 1, 2).contiguous(), torch.tensor(list(labels)), tuple(class_names)
    )


def _small(picture: Image.Image, sample_size: int) -> Image.Image:
    """Scaled, in L or RGB."""
    shown = as_shown(picture)
    return shown.convert("L" if shown.mode == "L" else "RGB").resize((sample_size, sample_size))
