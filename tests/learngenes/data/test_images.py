import io

import numpy as np
import pytest
from PIL import Image

from learngenes.data.images import as_shown

ORIENTATION = 0x0112
TURNED_RIGHT = 6
"""How a camera that was held upright says that its picture lies on the side."""


def reopened(picture: Image.Image, **options: object) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", **options)
    return Image.open(buffer)


def test_a_photograph_is_upright() -> None:
    lying = Image.new("RGB", (4, 2))
    lying.putpixel((0, 1), (255, 0, 0))
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED_RIGHT
    upright = as_shown(reopened(lying, exif=exif))
    assert upright.size == (2, 4)
    assert upright.getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "shown", "wanted"),
    [
        ("RGBA", (255, 0, 0, 0), "RGB", (255, 255, 255)),
        ("RGBA", (0, 0, 0, 128), "RGB", (127, 127, 127)),
        ("RGBA", (9, 8, 7, 255), "RGB", (9, 8, 7)),
        ("LA", (0, 0), "L", 255),
        ("L", 7, "L", 7),
    ],
)
def test_what_is_clear_is_white(
    mode: str, colour: tuple[int, ...], shown: str, wanted: object
) -> None:
    picture = as_shown(reopened(Image.new(mode, (2, 2), colour)))
    assert (picture.mode, picture.getpixel((0, 0))) == (shown, wanted)


def test_what_is_clear_in_a_palette_is_white() -> None:
    palette = Image.new("P", (2, 2), 0)
    palette.putpalette([255, 0, 0, 0, 255, 0])
    assert as_shown(reopened(palette, transparency=0)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bits_keep_their_shades() -> None:
    grey = Image.fromarray(np.array([[0, 256, 65535, 30000]], np.uint16))
    shown = as_shown(reopened(grey))
    assert shown.mode == "L"
    assert np.asarray(shown).tolist() == [[0, 1, 255, 117]]
