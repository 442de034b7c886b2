"""Labelled images from IDX files, an image folder, or a Hugging Face `datasets` directory."""

import gzip
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import EllipsisType

import numpy as np
import structlog
import torch
from numpy.typing import NDArray
from torch import Tensor

from learngenes.data.folders import CLASSES_FILE, class_folders, listed_classes, walked
from learngenes.data.images import DataError, read, scaled
from learngenes.data.saved import is_saved, load_saved

log = structlog.get_logger()


@dataclass(frozen=True)
class LabelledImages:
    """Images (uint8) or latents (float16), (N, C, H, W), with labels (int64, (N,))."""

    images: Tensor
    labels: Tensor
    class_names: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def normalised(self, indices: Tensor | EllipsisType = ...) -> Tensor:
        """Chosen images, by default all, as float32 in [-1, 1], or latents as they are."""
        chosen = self.images[indices].float()
        return chosen / 127.5 - 1 if self.images.dtype == torch.uint8 else chosen

    def drawn(
        self, count: int, null_class_probability: float, generator: torch.Generator
    ) -> tuple[Tensor, Tensor]:
        """Random images as `normalised`, and their labels, or the null class in place of some."""
        indices = torch.randint(len(self), (count,), generator=generator)
        labels = self.labels[indices]
        dropped = torch.rand(count, generator=generator) < null_class_probability
        labels[dropped] = len(self.class_names)
        return self.normalised(indices), labels

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
    """Read `split` ("train" or "test") of the data at `path`, in any of the three forms.

    `class_names` is used where the files carry only numbers. Images are resized to
    `sample_size` and kept in their own number of channels. Raises DataError.
    """
    if not path.is_dir():
        raise DataError(f"no data at {path}: the directory does not exist")
    if list(path.glob("*-idx3-ubyte*")):
        data = _load_idx(path, split, class_names)
    elif is_saved(path):
        rows, names = load_saved(path, split)
        data = _stack(((scaled(image, sample_size), label) for image, label in rows), names)
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
    """Read a file in Yann LeCun's IDX format: big-endian magic, dimensions, bytes."""
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
    files = walked(path)
    listed = path / CLASSES_FILE
    try:
        classes = listed_classes(listed.read_bytes()) if listed.exists() else None
        found = class_folders(files, classes)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    for some in found.skipped:
        log.info("skipped", reason=some.reason, count=some.count, examples=some.examples)
    taken = sorted(found.labels.items(), key=lambda file: (file[1], file[0]))
    return _stack(((_read(path / file, sample_size), n) for file, n in taken), found.class_names)


def _read(file: Path, sample_size: int) -> NDArray[np.uint8]:
    try:
        return read(file, sample_size)[0]
    except DataError as error:
        raise DataError(f"{file} {error}") from error


def _stack(
    rows: Iterable[tuple[NDArray[np.uint8], int]], class_names: Sequence[str]
) -> LabelledImages:
    """Stack pictures: one channel where all are grey, else RGB."""
    images, labels = zip(*rows, strict=True)
    channels = max(len(image) for image in images)
    stacked = np.stack([np.broadcast_to(image, (channels, *image.shape[1:])) for image in images])
    return LabelledImages(torch.from_numpy(stacked), torch.tensor(labels), tuple(class_names))
