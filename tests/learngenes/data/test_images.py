import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from learngenes.data.images import (
    DataError,
    as_picture,
    as_pixels,
    as_shown,
    class_name,
    encode_png,
    grid,
    read,
)

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


def test_a_class_has_a_name_that_can_be_read() -> None:
    assert class_name("wolf / dog") == "wolf / dog"
    assert class_name("cafe\u0301") == "caf\u00e9"
    for name in ("", "c\x01t", "x" * 101, "caf\udce9"):
        with pytest.raises(DataError, match="rename it"):
            class_name(name)


@pytest.mark.parametrize(
    ("mode", "told", "channels"), [("L", None, 1), ("RGB", None, 3), ("L", 3, 3), ("RGB", 1, 1)]
)
def test_a_picture_is_read_in_its_own_channels_or_in_those_that_are_told(
    tmp_path: Path, mode: str, told: int | None, channels: int
) -> None:
    Image.new(mode, (6, 4), "white").save(tmp_path / "1.png")
    pixels, count = read(tmp_path / "1.png", 2, told)
    assert (pixels.shape, pixels.min(), count) == ((channels, 2, 2), 255, 24)


def test_what_cannot_be_read_says_why() -> None:
    with pytest.raises(DataError, match=r"^has 6 x 4 pixels, more than 2\.3e-05 million; "):
        read(io.BytesIO(encode_png(Image.new("L", (6, 4)))), 2, most_pixels=23)
    gif = io.BytesIO()
    Image.new("L", (6, 4)).save(gif, "GIF")
    with pytest.raises(DataError, match=r"^is not a readable PNG.* image, whatever its name says$"):
        read(gif, 2)
    thin = io.BytesIO(encode_png(Image.new("L", (20_001, 1))))
    with pytest.raises(DataError, match="a side of more than 20000 pixels"):
        read(thin, 2)


def test_what_is_told_of_a_picture_does_not_stand_in_its_way() -> None:
    notes = PngImagePlugin.PngInfo()
    notes.add_text("notes", "x" * 3_000_000, zip=True)
    file = io.BytesIO()
    picture = Image.new("L", (6, 4), 7)
    picture.save(file, "PNG", pnginfo=notes, icc_profile=bytes(2_000_000))
    assert read(file, 2)[0].tolist() == [[[7, 7], [7, 7]]]
    exif = Image.Exif()
    exif[0x0112] = 6
    broken = io.BytesIO()
    picture.save(broken, "JPEG", exif=exif.tobytes().replace(b"\x12\x01\x03\0", b"\x12\x01\x02\0"))
    assert read(broken, 2)[1] == 24


@pytest.mark.parametrize("channels", [1, 3])
def test_rows_of_images_are_one_picture(channels: int) -> None:
    rows = [np.full((count, channels, 2, 3), 100 + count, np.uint8) for count in (2, 1)]
    rows[0][1, :, 1, 2] = 7
    pixels = as_pixels(grid(rows, scale=2))
    assert pixels.shape == (channels, 2 * 4, 2 * 6)
    assert (pixels[:, 2:4, 10:] == 7).all()
    assert (pixels[:, 4:, :6] == 101).all()
    assert (pixels[:, 4:, 6:] == 0).all()


def test_a_png_holds_the_same_pixels_and_may_be_smaller() -> None:
    pixels = np.arange(24, dtype=np.uint8).reshape(3, 2, 4)
    png = encode_png(as_picture(pixels))
    assert np.array_equal(as_pixels(Image.open(io.BytesIO(png))), pixels)
    large = as_picture(np.zeros((3, 256, 128), np.uint8))
    assert Image.open(io.BytesIO(encode_png(large, 64))).size == (32, 64)


def test_the_client_loads_neither_pillow_nor_numpy_for_it() -> None:
    code = (
        "import sys, fineserve.packing; sys.exit(bool({'PIL', 'numpy', 'torch'} & {*sys.modules}))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
