"""Uploads: images in a zip or tar of class folders, read with limits and never unpacked.

Nothing is written to disk by a name from the archive, and nothing in it is executed.
"""

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from learngenes.data.images import (
    CLASSES_FILE,
    SUFFIXES,
    DataError,
    class_name,
    encode_png,
    grid,
    is_hidden,
    is_image,
    read,
)

SAVED_SUFFIX = ".arrow"
"""Suffix of the files of a saved Hugging Face dataset."""
MOST_LISTED_BYTES = 1_000_000
LEAST_OF_A_CLASS = 2
"""Images of a class: one to learn from, and one more that may be kept to judge by."""

Member = tuple[PurePosixPath, "IO[bytes] | _Bounded"]


@dataclass(frozen=True)
class UploadLimits:
    unpacked_bytes: int
    images: int
    classes: int
    scaled_bytes: int
    """Bytes of all images as they are kept, small; they are held in memory twice."""
    image_pixels: int = 40_000_000
    all_pixels: int = 10_000_000_000
    """Pixels of all files together: two minutes of decoding."""
    file_bytes: int = 64_000_000


@dataclass(frozen=True)
class Upload:
    """Images, uint8 (N, C, H, W), and labels, int64 (N,), which are indices into class_names."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: list[str]


def read_upload(file: IO[bytes], limits: UploadLimits, channels: int, side: int) -> Upload:
    """Images of an archive, resized to `side` and made grey or RGB. Raises DataError."""
    folders: list[str] = []
    listed: dict[str, str] | None = None
    kept, pixels = bytearray(), 0
    for path, content in _members(file, limits):
        if path.name == CLASSES_FILE:
            listed = _listed(path, content)
            continue
        if len(folders) >= limits.images:
            raise DataError(f"there are more than {limits.images} images; send fewer")
        folders.append(_folder(path))
        image, size = _image(path, content, limits, channels, side)
        kept += image.tobytes()
        pixels += size
        if len(kept) > limits.scaled_bytes:
            raise DataError(
                f"{len(folders)} images of {channels} x {side} x {side} are more than "
                f"{limits.scaled_bytes / 1e6:.0f} MB; send fewer"
            )
        if pixels > limits.all_pixels:
            raise DataError(
                f"the first {len(folders)} images have more than {limits.all_pixels:.1e} pixels; "
                f"scale them down to {side} x {side}, as they are kept"
            )
    classes = _classes(folders, listed, limits)
    numbers = {folder: number for number, folder in enumerate(classes)}
    return Upload(
        np.frombuffer(kept, np.uint8).reshape(len(folders), channels, side, side),
        np.array([numbers[folder] for folder in folders], np.int64),
        list(classes.values()),
    )


def preview(upload: Upload, classes: int = 20, each: int = 10) -> bytes:
    """PNG with a row of the first images of each of the first classes."""
    labels = range(min(classes, len(upload.class_names)))
    return encode_png(grid(upload.images[upload.labels == label][:each] for label in labels))


def _classes(
    folders: list[str], listed: dict[str, str] | None, limits: UploadLimits
) -> dict[str, str]:
    """Names of the classes by their folders, in the listed order or else by the alphabet."""
    if not folders:
        raise DataError(
            f"there are no images ({', '.join(SUFFIXES)}) in it; put each into a folder "
            "that is named after its class"
        )
    counts = Counter(folders)
    names = {folder: folder for folder in sorted(counts)} if listed is None else listed
    if unlisted := counts.keys() - names.keys():
        raise DataError(f"folder {min(unlisted)!r} is not in {CLASSES_FILE}; name its class there")
    used = {folder: class_name(name) for folder, name in names.items() if folder in counts}
    if len(set(used.values())) < len(used):
        raise DataError(f"{CLASSES_FILE} gives one name to several folders; put them into one")
    if len(used) > limits.classes:
        raise DataError(f"there are {len(used)} classes; send at most {limits.classes}")
    for folder, name in used.items():
        if counts[folder] < LEAST_OF_A_CLASS:
            raise DataError(f"class {name!r} has one image; send {LEAST_OF_A_CLASS} or more")
    return used


def _listed(path: PurePosixPath, content: bytes) -> dict[str, str]:
    try:
        listed = json.loads(content) if len(content) <= MOST_LISTED_BYTES else None
    except (RecursionError, ValueError):
        listed = None
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise DataError(f"{str(path)!r} has to be a JSON object: a class's name for each folder")
    return listed


def _image(
    path: PurePosixPath, content: bytes, limits: UploadLimits, channels: int, side: int
) -> tuple[NDArray[np.uint8], int]:
    """Pixels, (C, side, side), and the number of pixels in the file."""
    where = repr(str(path))
    if len(content) > limits.file_bytes:
        raise DataError(f"{where} has more than {limits.file_bytes / 1e6:.0f} MB; scale it down")
    try:
        return read(io.BytesIO(content), side, channels, limits.image_pixels)
    except DataError as error:
        raise DataError(f"{where} {error}") from error


def _folder(path: PurePosixPath) -> str:
    name = path.parent.name
    if not name:
        raise DataError(f"{path.name!r} is in no folder; a folder's name is its images' class")
    return class_name(name)


def _members(file: IO[bytes], limits: UploadLimits) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Paths and contents of the images, and of the list of their classes; other files are skipped.

    A file that is too large is read until one byte more than it may have.
    """
    members = _zipped if zipfile.is_zipfile(file) else _tarred
    try:
        for path, opened in members(file, _Bounded(limits.unpacked_bytes)):
            yield path, opened.read(limits.file_bytes + 1)
    except DataError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"it is not a whole zip or tar archive: {error}") from error
    except (MemoryError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise DataError(f"the archive cannot be read: {error}") from error


def _zipped(file: IO[bytes], bounded: "_Bounded") -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if mode and (mode & 0o170000) not in (0, 0o100000, 0o040000):
                raise DataError(f"{member.filename!r} is a link or a device; send plain files")
            path = _safe(member.filename)
            if member.is_dir() or not _wanted(path):
                continue
            if member.flag_bits & 1:
                raise DataError(f"{member.filename!r} is encrypted; send it without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks others without a limit
                raise DataError(f"{member.filename!r} is not deflated; zip it in the usual way")
            with archive.open(member) as bounded.raw:  # whatever size the archive says it has
                yield path, bounded


def _tarred(file: IO[bytes], bounded: "_Bounded") -> Iterator[Member]:
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    bounded.raw = file
    for begins, unpack in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if magic.startswith(begins):
            bounded.raw = cast(IO[bytes], unpack(file))
    with tarfile.open(fileobj=bounded, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{member.name!r} is a link or a device; send plain files")
            path = _safe(member.name)
            if _wanted(path):
                opened = archive.extractfile(member)
                assert opened is not None
                yield path, opened


class _Bounded(io.RawIOBase):
    """Reader of one file after another (`raw`) that counts all bytes: headers and padding, too."""

    raw: IO[bytes]

    def __init__(self, most_bytes: int) -> None:
        self._most = self._left = most_bytes

    def read(self, size: int = -1) -> bytes:
        content = self.raw.read(self._left + 1 if size < 0 else min(size, self._left + 1))
        self._left -= len(content)
        if self._left < 0:
            raise DataError(f"it unpacks to more than {self._most / 1e6:.0f} MB; send fewer images")
        return content


def _wanted(path: PurePosixPath) -> bool:
    if path.suffix == SAVED_SUFFIX and not is_hidden(path):
        raise DataError(
            f"{str(path)!r} is of a saved Hugging Face dataset, and what is sent has to be class "
            "folders of images; `fineserve tasks create FOLDER` makes them of the dataset's folder "
            "and sends them"
        )
    return is_image(path) or (path.name == CLASSES_FILE and not is_hidden(path))


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise DataError(f"{name!r} is not a path inside the archive; pack it anew")
    return path
