"""Uploads: images in a zip or tar of class folders, read with limits and never unpacked.

Nothing is written to disk by a name from the archive, and nothing in it is executed. What is read
here comes from strangers: the service has it done in a process of its own (`readers`).
"""

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, cast

import numpy as np
from numpy.typing import NDArray

from learngenes.data.folders import CLASSES_FILE, Skipped, class_folders, listed_classes
from learngenes.data.images import DataError, encode_png, grid, read

SAVED_SUFFIX = ".arrow"
"""Suffix of the files of a saved Hugging Face dataset."""
LEAST_OF_A_CLASS = 2
"""Images of a class: one to learn from, and one more that may be kept to judge by."""
ENTRIES_PER_IMAGE = 5
"""Files of an archive for each image that it may have."""
LONGEST_PATH = 1_000
UTF8_FLAG = 0x800
UNICODE_PATH = 0x7075
"""Extra field of a zip's entry with its name in UTF-8 (APPNOTE 4.6.9)."""
HEADER = struct.Struct("<HH")

Member = tuple[PurePosixPath, "IO[bytes] | _Bounded"]
Wanted = Callable[[PurePosixPath], bool]


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
    skipped: list[Skipped]


def read_upload(file: IO[bytes], limits: UploadLimits, channels: int, side: int) -> Upload:
    """Images of an archive, resized to `side` and made grey or RGB. Raises DataError."""
    paths: list[PurePosixPath] = []
    listed: dict[str, str] | None = None

    def listing(path: PurePosixPath) -> bool:
        _refuse_saved(path)
        if len(paths) >= ENTRIES_PER_IMAGE * limits.images:
            raise DataError(f"there are more than {len(paths)} files in it; send fewer")
        paths.append(path)
        return path.name == CLASSES_FILE

    for _, content in _members(file, limits, listing):
        listed = listed_classes(content)
    found = class_folders(paths, listed)
    _refuse_many(found.class_names, Counter(found.labels.values()), limits)
    kept, labels, pixels = bytearray(), [], 0
    left = dict(found.labels)
    for path, content in _members(file, limits, found.labels.__contains__):
        if path not in left:
            raise DataError(f"{str(path)!r} is in it more than once; pack it anew")
        labels.append(left.pop(path))
        image, size = _image(path, content, limits, channels, side)
        kept += image.tobytes()
        pixels += size
        if len(kept) > limits.scaled_bytes:
            raise DataError(
                f"{len(labels)} images of {channels} x {side} x {side} are more than "
                f"{limits.scaled_bytes / 1e6:.0f} MB; send fewer"
            )
        if pixels > limits.all_pixels:
            raise DataError(
                f"the first {len(labels)} images have more than {limits.all_pixels:.1e} pixels; "
                f"scale them down to {side} x {side}, as they are kept"
            )
    return Upload(
        np.frombuffer(kept, np.uint8).reshape(len(labels), channels, side, side),
        np.array(labels, np.int64),
        found.class_names,
        found.skipped,
    )


def preview(upload: Upload, classes: int = 20, each: int = 10) -> bytes:
    """PNG with a row of the first images of each of the first classes."""
    labels = range(min(classes, len(upload.class_names)))
    return encode_png(grid(upload.images[upload.labels == label][:each] for label in labels))


def _refuse_many(class_names: list[str], counts: Counter[int], limits: UploadLimits) -> None:
    if counts.total() > limits.images:
        raise DataError(f"there are more than {limits.images} images; send fewer")
    if len(class_names) > limits.classes:
        raise DataError(f"there are {len(class_names)} classes; send at most {limits.classes}")
    for number, name in enumerate(class_names):
        if counts[number] < LEAST_OF_A_CLASS:
            raise DataError(f"class {name!r} has one image; send {LEAST_OF_A_CLASS} or more")


def _refuse_saved(path: PurePosixPath) -> None:
    if path.suffix == SAVED_SUFFIX and not path.name.startswith("."):
        raise DataError(
            f"{str(path)!r} is of a saved Hugging Face dataset, and what is sent has to be class "
            "folders of images; `fineserve tasks create FOLDER` makes them of the dataset's "
            "folder and sends them. It needs an Image column, with one image a row and not a list "
            "of images, and a ClassLabel column: `dataset.class_encode_column(…)` makes one of "
            "text, `dataset.cast_column(…, ClassLabel(names=[…]))` of numbers"
        )


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


def _members(
    file: IO[bytes], limits: UploadLimits, wanted: Wanted
) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Paths and contents of those files that are wanted, each of which is asked for.

    A file that is too large is read until one byte more than it may have.
    """
    members = _zipped if zipfile.is_zipfile(file) else _tarred
    try:
        for path, opened in members(file, _Bounded(limits.unpacked_bytes), wanted):
            yield path, opened.read(limits.file_bytes + 1)
    except DataError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as error:
        raise DataError(f"it is not a whole zip or tar archive: {error}") from error
    except MemoryError as error:
        raise DataError("the archive takes too much memory to read; pack it anew") from error
    except (NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise DataError(f"the archive cannot be read: {error}") from error


def _zipped(file: IO[bytes], bounded: "_Bounded", wanted: Wanted) -> Iterator[Member]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if mode and (mode & 0o170000) not in (0, 0o100000, 0o040000):
                raise DataError(f"{member.filename!r} is a link or a device; send plain files")
            path = _safe(_zipped_name(member).replace("\\", "/"))  # as old Windows packs them
            if member.is_dir() or not wanted(path):
                continue
            if member.flag_bits & 1:
                raise DataError(f"{member.filename!r} is encrypted; send it without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks others without a limit
                raise DataError(f"{member.filename!r} is not deflated; zip it in the usual way")
            with archive.open(member) as bounded.raw:  # whatever size the archive says it has
                yield path, bounded


def _zipped_name(member: zipfile.ZipInfo) -> str:
    """Name of an entry in UTF-8, whether or not it says so. Raises DataError for another code."""
    if member.flag_bits & UTF8_FLAG or member.orig_filename.isascii():
        return member.filename
    raw = member.orig_filename.encode("cp437")  # as zipfile has decoded it
    try:
        return _unicode_path(member.extra, raw).decode()
    except UnicodeDecodeError:
        raise DataError(
            f"the name {member.filename!a} in the zip is not in UTF-8; zip it anew with names in "
            "UTF-8, or send a tar"
        ) from None


def _unicode_path(extra: bytes, raw: bytes) -> bytes:
    """The name in an entry's extra field, if it is of the name `raw`; else `raw`."""
    while len(extra) >= HEADER.size:
        kind, size = HEADER.unpack_from(extra)
        content, extra = extra[HEADER.size :][:size], extra[HEADER.size + size :]
        beginning = b"\x01" + zlib.crc32(raw).to_bytes(4, "little")
        if kind == UNICODE_PATH and content.startswith(beginning):
            return content[len(beginning) :]
    return raw


def _tarred(file: IO[bytes], bounded: "_Bounded", wanted: Wanted) -> Iterator[Member]:
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    bounded.raw = file
    for begins, unpack in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if magic.startswith(begins):
            bounded.raw = cast(IO[bytes], unpack(file))
    with tarfile.open(fileobj=bounded, mode="r|") as archive:
        for member in archive:
            archive.members.clear()  # type: ignore[attr-defined]  # which would keep all of them, and what each inherited
            if member.isdir():
                continue
            if not member.isreg():
                raise DataError(f"{member.name!r} is a link or a device; send plain files")
            path = _safe(member.name)
            if wanted(path):
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


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if "\\" in name:
        raise DataError(f"{name!r} has a backslash, which is no part of a path here; pack it anew")
    if path.is_absolute() or ".." in path.parts or "\0" in name or len(name) > LONGEST_PATH:
        raise DataError(f"{name[:LONGEST_PATH]!r} is not a path inside the archive; pack it anew")
    return path
