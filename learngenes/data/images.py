"""Pictures as a viewer shows them, before they are made small: for training and for uploads."""

import numpy as np
from PIL import Image, ImageOps

GREY_16_BIT = "I"
"""How Pillow's modes of such pictures begin."""


def as_shown(picture: Image.Image) -> Image.Image:
    """Upright by its EXIF orientation, with 8 bits a channel, in front of white where it is clear.

    L where it is grey; RGB, or any other mode without transparency. `picture` may be turned itself.
    """
    ImageOps.exif_transpose(picture, in_place=True)
    if picture.mode.startswith(GREY_16_BIT):
        grey = np.asarray(picture).astype(np.int64).clip(0, 2**16 - 1) >> 8  # Pillow would clip
        return Image.fromarray(grey.astype(np.uint8))
    if not picture.has_transparency_data:
        return picture
    clear = picture if picture.mode in ("LA", "RGBA") else picture.convert("RGBA")
    shown = Image.new("L" if clear.mode == "LA" else "RGB", clear.size, "white")
    shown.paste(clear.convert(shown.mode), mask=clear.getchannel("A"))
    return shown
