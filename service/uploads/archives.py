"""Images that a client uploads, as a zip or tar of class folders, or of what Hugging Face datasets
has saved: read with limits, never unpacked.

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
from PIL import Image

from learngenes.data.images import as_shown
from service.uploads.arrow import ArrowError, labelled_images

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
DATASET_SUFFIX = ".arrow"
DATASET_STATE = "state.json"
"""It names the files of a dataset: others beside them are caches of Hugging Face datasets."""
MOST_STATE_BYTES = 1_000_000
TRAINING_SPLIT = "train"
JUNK = "__MACOSX"
LEAST_OF_A_CLASS = 2
"""One to learn from, and one more that may be kept to judge by."""


class UploadError(Exception):
    """What was uploaded cannot be used; the message says what to change."""


@dataclass(frozen=True)
class UploadLimits:
    unpacked_bytes: int
    images: int
    classes: int
    scaled_bytes: int
    """Of all images as they are kept, small; they are held in memory twice."""
    image_pixels: int = 40_000_000
    all_pixels: int = 10_000_000_000
    """Of the files together: two minutes of decoding."""
    file_bytes: int = 64_000_000


@dataclass(frozen=True)
class Upload:
    """images: uint8 (N, C, H, W); labels: int64 (N,), indices into class_names."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: list[str]


def read_upload(file: IO[bytes], limits: UploadLimits, channels: int, side: int) -> Upload:
    """All images, resized to `side` and converted to grey or RGB. Raises UploadError.

    Of a dataset with several splits those of `train`.
    """
    names: list[str] = []
    scaled, pixels = bytearray(), 0
    for class_name, where, content in _labelled(file, limits):
        if len(names) >= limits.images:
            raise UploadError(f"there are more than {limits.images} images; send fewer")
        _check_file(where, len(content), limits)
        image, size = _scaled(where, content, limits, channels, side)
        names.append(class_name)
        scaled += image.tobytes()
        pixels += size
        if len(scaled) > limits.scaled_bytes:
            raise UploadError(
                f"{len(names)} images of {channels} x {side} x {side} are more than "
                f"{limits.scaled_bytes / 1e6:.0f} MB; send fewer"
            )
        if pixels > limits.all_pixels:
            raise UploadError(
                f"the first {len(names)} images have more than {limits.all_pixels:.1e} pixels; "
                f"scale them down to {side} x {side}, as they are kept"
            )
    class_names = sorted(set(names))
    _check_classes(class_names, names, limits)
    numbers = {name: number for number, name in enumerate(class_names)}
    return Upload(
        np.frombuffer(scaled, np.uint8).reshape(len(names), channels, side, side),
        np.array([numbers[name] for name in names], np.int64),
        class_names,
    )


def _check_classes(class_names: list[str], names: list[str], limits: UploadLimits) -> None:
    if not names:
        raise UploadError(
            f"there are no images ({', '.join(sorted(SUFFIXES))}) in it; put each into a folder "
            "that is named after its class, or send what Hugging Face datasets has saved"
        )
    if len(class_names) > limits.classes:
        raise UploadError(f"there are {len(class_names)} classes; send at most {limits.classes}")
    for name, count in Counter(names).items():
        if count < LEAST_OF_A_CLASS:
            raise UploadError(f"class {name!r} has one image; send {LEAST_OF_A_CLASS} or more")


def _labelled(file: IO[bytes], limits: UploadLimits) -> Iterator[tuple[str, str, bytes]]:
    """Class name, place in the archive and encoded image, in the order of the archive."""
    try:
        dataset = _dataset(file, limits)
        for path, opened in _members(file, limits):
            if path in dataset:
                yield from _rows(path, opened)
            elif not dataset and path.suffix.lower() in SUFFIXES:
                yield _folder(path), str(path), _content(opened, limits)
    except UploadError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as error:
        raise UploadError(f"it is not a whole zip or tar archive: {error}") from error
    except (MemoryError, NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise UploadError(f"the archive cannot be read: {error}") from error


def _rows(path: PurePosixPath, opened: IO[bytes]) -> Iterator[tuple[str, str, bytes]]:
    try:
        for row, (name, content) in enumerate(labelled_images(opened)):
            yield _class(name), f"{path}, row {row}", content
    except ArrowError as error:
        raise UploadError(f"{str(path)!r} {error}") from error


def _dataset(file: IO[bytes], limits: UploadLimits) -> set[PurePosixPath]:
    """The files of a dataset's training split; none when the archive holds images instead."""
    saved: dict[PurePosixPath, set[PurePosixPath]] = {}
    images, data = False, set()
    for path, opened in _members(file, limits):
        if path.name == DATASET_STATE:
            if files := _data_files(opened):
                saved[path.parent] = {path.parent / name for name in files}
        elif path.suffix == DATASET_SUFFIX:
            data.add(path)
        else:
            images = True
    if not data:
        return set()
    if images:
        raise UploadError("there are image files beside a dataset; send either")
    if not saved:
        raise UploadError(f"there is no {DATASET_STATE}; send all that `save_to_disk` has written")
    training = [split for split in saved if split.name == TRAINING_SPLIT] or list(saved)
    if len(training) != 1:
        names = ", ".join(sorted(map(str, saved)))
        raise UploadError(f"there are several datasets ({names}); send one, or call one train")
    chosen = saved[training[0]]
    if missing := chosen - data:
        raise UploadError(f"{str(min(missing))!r} is missing; pack the whole dataset")
    return chosen


def _data_files(opened: IO[bytes]) -> list[str]:
    try:
        state = json.loads(opened.read(MOST_STATE_BYTES))
        return [str(file["filename"]) for file in state["_data_files"]]
    except (KeyError, TypeError, ValueError):
        return []  # of something else


def _members(file: IO[bytes], limits: UploadLimits) -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    """Images and datasets by their path, to be read at once; what else there is, is skipped."""
    allowance = _Allowance(limits.unpacked_bytes)
    members = _zipped if zipfile.is_zipfile(file) else _tarred
    return members(file, allowance)


def _zipped(file: IO[bytes], allowance: "_Allowance") -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if mode and (mode & 0o170000) not in (0, 0o100000, 0o040000):
                raise UploadError(f"{member.filename!r} is a link or a device; send plain files")
            path = _safe(member.filename)
            if member.is_dir() or not _wanted(path):
                continue
            if member.flag_bits & 1:
                raise UploadError(f"{member.filename!r} is encrypted; send it without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                # zipfile unpacks others without a limit
                raise UploadError(f"{member.filename!r} is not deflated; zip it in the usual way")
            with archive.open(member) as opened:  # whatever size the archive says it has
                yield path, _bounded(opened, allowance)


def _tarred(file: IO[bytes], allowance: "_Allowance") -> Iterator[tuple[PurePosixPath, IO[bytes]]]:
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    raw: IO[bytes] = file
    for begins, unpack in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if magic.startswith(begins):
            raw = cast(IO[bytes], unpack(file))
    with tarfile.open(fileobj=_bounded(raw, allowance), mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg():
                raise UploadError(f"{member.name!r} is a link or a device; send plain files")
            path = _safe(member.name)
            if _wanted(path):
                opened = archive.extractfile(member)
                assert opened is not None
                yield path, opened


def _content(opened: IO[bytes], limits: UploadLimits) -> bytes:
    """And one byte more of what is too large."""
    return opened.read(limits.file_bytes + 1)


@dataclass
class _Allowance:
    """So many bytes may still be unpacked."""

    left: int

    def __post_init__(self) -> None:
        self.all = self.left

    def take(self, count: int) -> None:
        self.left -= count
        if self.left < 0:
            raise UploadError(f"it unpacks to more than {self.all / 1e6:.0f} MB; send fewer images")


class _Bounded(io.RawIOBase):
    """Takes what is read from an allowance: headers and padding, too."""

    def __init__(self, raw: IO[bytes], allowance: _Allowance) -> None:
        self._raw, self._allowance = raw, allowance

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        most = self._allowance.left + 1
        content = self._raw.read(most if size < 0 else min(size, most))
        self._allowance.take(len(content))
        return content


def _bounded(raw: IO[bytes], allowance: _Allowance) -> IO[bytes]:
    return cast(IO[bytes], _Bounded(raw, allowance))


def _wanted(path: PurePosixPath) -> bool:
    known = path.suffix.lower() in (*SUFFIXES, DATASET_SUFFIX) or path.name == DATASET_STATE
    return known and not _hidden(path)


def _check_file(where: str, size: int, limits: UploadLimits) -> None:
    if size > limits.file_bytes:
        raise UploadError(
            f"{where!r} has more than {limits.file_bytes / 1e6:.0f} MB; scale it down"
        )


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UploadError(f"{name!r} is not a path inside the archive; pack it anew")
    return path


def _hidden(path: PurePosixPath) -> bool:
    return any(part == JUNK or part.startswith(".") for part in path.parts)


def _folder(path: PurePosixPath) -> str:
    name = path.parent.name
    if not name:
        raise UploadError(f"{path.name!r} is in no folder; a folder's name is its images' class")
    return _class(name)


def _class(name: str) -> str:
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UploadError(f"the class {name!r} has no name in Unicode; rename it") from None
    if not 0 < len(name) <= 100 or not name.isprintable():
        raise UploadError(f"{name[:100]!r} is no name for a class; rename it")
    return name


def _scaled(
    where: str, content: bytes, limits: UploadLimits, channels: int, side: int
) -> tuple[NDArray[np.uint8], int]:
    """(C, side, side), and how many pixels it had."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > limits.image_pixels:
                raise UploadError(f"{where!r} has {width} x {height} pixels; scale it down")
            converted = as_shown(picture).convert("L" if channels == 1 else "RGB")
            small = np.asarray(converted.resize((side, side)), np.uint8)
    except UploadError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise UploadError(
            f"{where!r} is not a readable {', '.join(FORMATS)} image: {error}"
        ) from error
    return small.reshape(side, side, channels).transpose(2, 0, 1), width * height


def preview(upload: Upload, classes: int = 20, each: int = 10) -> bytes:
    """A PNG with a row of its first images for each of its first classes."""
    rows = []
    for label in range(min(classes, len(upload.class_names))):
        chosen = upload.images[upload.labels == label][:each]
        blank = np.zeros((each - len(chosen), *upload.images.shape[1:]), np.uint8)
        rows.append(np.concatenate([*chosen, *blank], axis=2))
    sheet = np.concatenate(rows, axis=1).transpose(1, 2, 0)
    buffer = io.BytesIO()
    Image.fromarray(sheet[..., 0] if sheet.shape[2] == 1 else sheet).save(buffer, "PNG")
    return buffer.getvalue()
