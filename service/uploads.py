"""Images that a client uploads, as a zip or tar of class folders: read with limits, never unpacked.

Nothing is written to disk by a name from the archive, and nothing in it is executed.
"""

import bz2
import gzip
import io
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

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
JUNK = "__MACOSX"
LEAST_OF_A_CLASS = 2
"""One to learn from, and one more that may be kept to judge by."""


class UploadError(ValueError):
    """What was uploaded cannot be used; the message says what to change."""


@dataclass(frozen=True)
class Limits:
    unpacked_bytes: int
    images: int
    classes: int
    image_pixels: int = 64_000_000
    file_bytes: int = 64_000_000


@dataclass(frozen=True)
class Upload:
    """images: uint8 (N, C, H, W); labels: int64 (N,), indices into class_names."""

    images: NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: list[str]


def read_upload(file: IO[bytes], limits: Limits, channels: int, side: int) -> Upload:
    """All images, resized to `side` and converted to grey or RGB. Raises UploadError."""
    pictures: list[tuple[str, NDArray[np.uint8]]] = []
    for path, content in _files(file, limits):
        if len(pictures) >= limits.images:
            raise UploadError(f"there are more than {limits.images} images; send fewer")
        pictures.append((_class(path), _pixels(path, content, limits, channels, side)))
    class_names = sorted({name for name, _ in pictures})
    _check_classes(class_names, [name for name, _ in pictures], limits)
    numbers = {name: number for number, name in enumerate(class_names)}
    return Upload(
        np.stack([pixels for _, pixels in pictures]).transpose(0, 3, 1, 2),
        np.array([numbers[name] for name, _ in pictures], np.int64),
        class_names,
    )


def _check_classes(class_names: list[str], names: list[str], limits: Limits) -> None:
    if not names:
        raise UploadError(
            f"there are no images ({', '.join(sorted(SUFFIXES))}) in it; put each into a folder "
            "that is named after its class"
        )
    if len(class_names) > limits.classes:
        raise UploadError(
            f"there are {len(class_names)} class folders; send at most {limits.classes}"
        )
    for name, count in Counter(names).items():
        if count < LEAST_OF_A_CLASS:
            raise UploadError(f"class {name!r} has one image; send {LEAST_OF_A_CLASS} or more")


def _files(file: IO[bytes], limits: Limits) -> Iterator[tuple[PurePosixPath, bytes]]:
    """Images by their path, in the order of the archive; what else there is, is skipped."""
    try:
        members = _zipped(file, limits) if zipfile.is_zipfile(file) else _tarred(file, limits)
        for name, content in members:
            yield _safe(name), content
    except UploadError:
        raise
    except (tarfile.TarError, zipfile.BadZipFile, lzma.LZMAError, EOFError, OSError) as error:
        raise UploadError(f"it is not a whole zip or tar archive: {error}") from error
    except (NotImplementedError, RuntimeError, ValueError, zlib.error) as error:
        raise UploadError(f"the archive cannot be read: {error}") from error


def _zipped(file: IO[bytes], limits: Limits) -> Iterator[tuple[str, bytes]]:
    left = limits.unpacked_bytes
    with zipfile.ZipFile(file) as archive:
        for member in archive.infolist():
            mode = member.external_attr >> 16
            if mode and (mode & 0o170000) not in (0, 0o100000, 0o040000):
                raise UploadError(f"{member.filename!r} is a link or a device; send plain files")
            if member.is_dir() or not _image(member.filename):
                continue
            if member.flag_bits & 1:
                raise UploadError(f"{member.filename!r} is encrypted; send it without a password")
            with archive.open(member) as opened:  # whatever size the archive says it has
                content = opened.read(min(left, limits.file_bytes) + 1)
            left -= len(content)
            _check_file(member.filename, len(content), limits)
            if left < 0:
                raise UploadError(_too_large(limits))
            yield member.filename, content


def _tarred(file: IO[bytes], limits: Limits) -> Iterator[tuple[str, bytes]]:
    file.seek(0)
    magic = file.read(6)
    file.seek(0)
    raw: IO[bytes] = file
    for begins, unpack in ((b"\x1f\x8b", gzip.open), (b"BZh", bz2.open), (b"\xfd7zXZ", lzma.open)):
        if magic.startswith(begins):
            raw = cast(IO[bytes], unpack(file))
    bounded = cast(IO[bytes], _Bounded(raw, limits))
    with tarfile.open(fileobj=bounded, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            if not member.isreg():
                raise UploadError(f"{member.name!r} is a link or a device; send plain files")
            if not _image(member.name):
                continue
            _check_file(member.name, member.size, limits)
            opened = archive.extractfile(member)
            assert opened is not None
            yield member.name, opened.read()


class _Bounded(io.RawIOBase):
    """No more than so many bytes, headers and padding among them."""

    def __init__(self, raw: IO[bytes], limits: Limits) -> None:
        self._raw, self._limits, self._left = raw, limits, limits.unpacked_bytes

    def read(self, size: int = -1) -> bytes:
        most = self._left + 1
        content = self._raw.read(most if size < 0 else min(size, most))
        self._left -= len(content)
        if self._left < 0:
            raise UploadError(_too_large(self._limits))
        return content


def _image(name: str) -> bool:
    path = _safe(name)
    return path.suffix.lower() in SUFFIXES and not _hidden(path)


def _check_file(name: str, size: int, limits: Limits) -> None:
    if size > limits.file_bytes:
        raise UploadError(f"{name!r} has more than {limits.file_bytes / 1e6:.0f} MB; scale it down")


def _too_large(limits: Limits) -> str:
    return f"it unpacks to more than {limits.unpacked_bytes / 1e6:.0f} MB; send fewer images"


def _safe(name: str) -> PurePosixPath:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name:
        raise UploadError(f"{name!r} is not a path inside the archive; pack it anew")
    return path


def _hidden(path: PurePosixPath) -> bool:
    return any(part == JUNK or part.startswith(".") for part in path.parts)


def _class(path: PurePosixPath) -> str:
    name = path.parent.name
    if not name:
        raise UploadError(f"{path.name!r} is in no folder; a folder's name is its images' class")
    try:
        name.encode()
    except UnicodeEncodeError:
        raise UploadError(f"the folder {name!r} has no name in Unicode; rename it") from None
    if len(name) > 100 or not name.isprintable():
        raise UploadError(f"the folder {name[:100]!r} is no name for a class; rename it")
    return name


def _pixels(
    path: PurePosixPath, content: bytes, limits: Limits, channels: int, side: int
) -> NDArray[np.uint8]:
    """(side, side, C)."""
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as picture:
            width, height = picture.size
            if width * height > limits.image_pixels:
                raise UploadError(f"{str(path)!r} has {width} x {height} pixels; scale it down")
            converted = picture.convert("L" if channels == 1 else "RGB").resize((side, side))
    except UploadError:
        raise
    except Exception as error:  # Pillow's decoders raise whatever they like
        raise UploadError(
            f"{str(path)!r} is not a readable {', '.join(FORMATS)} image: {error}"
        ) from error
    return np.asarray(converted, np.uint8).reshape(side, side, channels)


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
