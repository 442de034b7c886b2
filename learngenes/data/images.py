"""Rules for image files, class names and pictures, and the drawing of image grids.

Training, uploads and the client that packs them decide by these rules alone. Pillow and numpy are
imported where they are used: the client is installed without them.
"""

from __future__ import annotations

import contextlib
import io
import unicodedata
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image

    Pixels = NDArray[np.uint8]

FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
"""Names of Pillow's decoders that may run."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp")
LONGEST_SIDE = 20_000
"""Pixels of a side: what scaling needs grows with it, however thin the picture."""
MOST_TEXT_BYTES = 64_000_000
"""Bytes of each text or profile inside a PNG; Pillow allows 1 MB. It is not used."""
LONGEST_CLASS_NAME = 100


class DataError(ValueError):
    """Images or classes that cannot be used; the message says where, why and what to do."""


def class_name(name: str) -> str:
    """`name`, in composed characters (NFC). Raises DataError where no class can have it."""
    name = unicodedata.normalize("NFC", name)
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(f"the class {name!r} has no name in Unicode; rename it") from None
    if not 0 < len(name) <= LONGEST_CLASS_NAME or not name.isprintable():
        raise DataError(f"{name[:LONGEST_CLASS_NAME]!r} is no name for a class; rename it")
    return name


def read(
    file: Path | IO[bytes], side: int, channels: int | None = None, most_pixels: int | None = None
) -> tuple[Pixels, int]:
    """Pixels as `scaled` gives them, and how many the file had.

    Raises DataError; its message goes on after the file's name.
    """
    from PIL import Image, PngImagePlugin, UnidentifiedImageError

    PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = MOST_TEXT_BYTES
    kinds = ", ".join(FORMATS)
    try:
        with Image.open(file, formats=FORMATS) as picture:
            width, height = picture.size
            if max(width, height) > LONGEST_SIDE:
                raise DataError(f"has a side of more than {LONGEST_SIDE} pixels; scale it down")
            if most_pixels is not None and width * height > most_pixels:
                raise DataError(
                    f"has {width} x {height} pixels, more than {most_pixels / 1e6:g} million; "
                    "scale it down"
                )
            return scaled(picture, side, channels), width * height
    except DataError:
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"is not a readable {kinds} image, whatever its name says") from error
    except Exception as error:  # Pillow's decoders raise whatever they like
        if "Decompressed data too large" in str(error):
            raise DataError("has too much text or too long a profile; save it without") from error
        raise DataError(f"is not a readable {kinds} image: {error}") from error


def scaled(picture: Image.Image, side: int, channels: int | None = None) -> Pixels:
    """Pixels (C, side, side) in 1 channel or 3; by default 1 where the picture is grey."""
    shown = as_shown(picture)
    grey = channels == 1 or (channels is None and shown.mode == "L")
    return as_pixels(shown.convert("L" if grey else "RGB").resize((side, side)))


def as_shown(picture: Image.Image) -> Image.Image:
    """The picture upright by its EXIF orientation, with 8 bits a channel, in front of white.

    L where it is grey; RGB, or any other mode without transparency. `picture` may be turned itself.
    """
    import numpy as np
    from PIL import Image, ImageOps

    with contextlib.suppress(Exception):  # EXIF that cannot be read turns nothing
        ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith("I"):  # grey in 16 bits
        grey = np.asarray(picture).clip(0, 2**16 - 1) >> 8  # Pillow would clip to 8 bits
        return Image.fromarray(grey.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    clear = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    shown = Image.new("L" if clear.mode == "LA" else "RGB", clear.size, "white")
    shown.paste(clear.convert(shown.mode), mask=clear.getchannel("A"))
    return shown


def as_pixels(picture: Image.Image) -> Pixels:
    """Pixels (C, H, W) of a picture in L or RGB."""
    import numpy as np

    pixels = np.asarray(picture, np.uint8)
    return pixels.reshape(picture.height, picture.width, -1).transpose(2, 0, 1)


def as_picture(pixels: Pixels) -> Image.Image:
    """Picture of pixels (C, H, W) in one channel or three."""
    from PIL import Image

    return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def grid(rows: Iterable[Pixels], scale: int = 1) -> Image.Image:
    """Grid of rows of images, each (N, C, H, W), enlarged `scale` times; shorter rows end black."""
    import numpy as np
    from PIL import Image

    lines = [np.concatenate([*row], axis=2) for row in rows]
    width = max(line.shape[2] for line in lines)
    padded = [np.pad(line, ((0, 0), (0, 0), (0, width - line.shape[2]))) for line in lines]
    picture = as_picture(np.concatenate(padded, axis=1))
    size = (picture.width * scale, picture.height * scale)
    return picture.resize(size, Image.Resampling.NEAREST)


def encode_png(picture: Image.Image, most_pixels: int | None = None) -> bytes:
    """The picture's file; before that it is itself scaled down to `most_pixels` a side."""
    if most_pixels is not None:
        picture.thumbnail((most_pixels, most_pixels))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()
