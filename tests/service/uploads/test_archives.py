"""Archives that clients send: a good one is read, and no other does any harm."""

import dataclasses
import io
import struct
import tarfile
import zipfile
import zlib
from typing import IO

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from learngenes.data.folders import CLASSES_FILE
from learngenes.data.images import DataError
from service.uploads.archives import UploadLimits, _unicode_path, _zipped_name, preview, read_upload
from tests.support.archives import Files, png, tarred, zipped
from tests.support.failures import EDIT, Edit, damaged

LIMITS = UploadLimits(
    unpacked_bytes=200_000, images=20, classes=3, scaled_bytes=10_000, image_pixels=10_000
)


def read(file: IO[bytes], channels: int = 3, **limits: int) -> list[str]:
    return read_upload(file, dataclasses.replace(LIMITS, **limits), channels, 4).class_names


GOOD: Files = {
    "mine/cat/1.png": png(10),
    "mine/cat/2.jpg": png(20, kind="JPEG"),
    "mine/dog/a.PNG": png(30, side=30),
    "mine/dog/b.webp": png(40, kind="WEBP"),
    "mine/readme.txt": b"not an image",
    "__MACOSX/mine/cat/._1.png": b"junk",
}


@pytest.mark.parametrize(
    "archive",
    [zipped(GOOD), *(tarred(GOOD, compression) for compression in ("", "gz", "bz2", "xz"))],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_folders_are_classes(archive: io.BytesIO, channels: int) -> None:
    upload = read_upload(archive, LIMITS, channels, 4)
    assert upload.class_names == ["cat", "dog"]
    assert upload.images.shape == (4, channels, 4, 4)
    assert [*upload.labels] == [0, 0, 1, 1]
    if channels == 3:
        assert upload.images[2, 0].max() == 30
        assert upload.images[2, 1].max() == 0
    sheet = Image.open(io.BytesIO(preview(upload)))
    assert sheet.size == (8, 8)


def test_pixels_that_are_kept_in_memory_have_a_limit() -> None:
    limit = 3 * 3 * 4 * 4
    with pytest.raises(DataError, match="4 images of 3 x 4 x 4 are more than 0 MB"):
        read(zipped(GOOD), scaled_bytes=limit)
    assert read(zipped(GOOD), channels=1, scaled_bytes=limit) == ["cat", "dog"]


def test_pixels_that_are_decoded_have_a_limit() -> None:
    with pytest.raises(DataError, match=r"first 3 images have more than 1\.0e\+03 pixels"):
        read(zipped(GOOD), all_pixels=2 * 8 * 8 + 30 * 30 - 1)


def test_pictures_are_taken_as_a_viewer_shows_them() -> None:
    files = {"cat/1.png": png((255, 0, 0, 0), mode="RGBA"), "cat/2.png": png(10)}
    images = read_upload(zipped(files), LIMITS, 3, 4).images
    assert images[0].min() == 255


def named(*names: bytes) -> io.BytesIO:
    """Zip of two images in each folder, whose name is in a code of its own, and does not say so."""
    marks = [f"@{i}" * (len(name) // 2 + 1) for i, name in enumerate(names)]
    pairs = [*zip(marks, names, strict=True)]
    files = {f"{mark[: len(n)]}/{i}.png": png() for mark, n in pairs for i in (1, 2)}
    content = zipped(files).getvalue()
    for mark, name in pairs:
        content = content.replace(mark[: len(name)].encode(), name)
    return io.BytesIO(content)


def test_names_of_a_zip_are_in_utf_8_or_refused() -> None:
    assert read(named("café".encode(), "猫犬".encode())) == ["café", "猫犬"]
    for code, name in (("cp1252", "señal"), ("gbk", "猫狗"), ("cp932", "犬猫")):
        with pytest.raises(DataError, match="is not in UTF-8"):
            read(named(name.encode(code)))


def test_the_name_in_unicode_that_a_zip_has_beside_another_counts() -> None:
    raw, name = "猫狗".encode("gbk"), "猫狗".encode()
    field = b"\x01" + zlib.crc32(raw + b"/1.png").to_bytes(4, "little") + name + b"/1.png"
    member = zipfile.ZipInfo((raw + b"/1.png").decode("cp437"))
    assert _unicode_path(struct.pack("<HH", 0x7075, len(field)) + field, raw + b"/1.png") == (
        name + b"/1.png"
    )
    assert _unicode_path(struct.pack("<HH", 0x7075, len(field)) + field, b"other") == b"other"
    member.extra = struct.pack("<HH", 0x7075, len(field)) + field
    assert _zipped_name(member) == "猫狗/1.png"


def test_an_archive_has_so_many_files() -> None:
    files = {**TWO, **{f"cat/{i}.txt": b"" for i in range(20)}}
    assert read(zipped(files), images=5) == ["cat"]
    with pytest.raises(DataError, match="more than 20 files in it"):
        read(zipped(files), images=4)


def test_backslashes_of_a_zip_are_slashes() -> None:
    files = {f"mine\\{name}\\{i}.png": png() for name in ("cat", "dog") for i in (1, 2)}
    assert read(zipped(files)) == ["cat", "dog"]
    with pytest.raises(DataError, match="has a backslash"):
        read(tarred(files))


@pytest.mark.parametrize("name", ["../cat/1.png", "/cat/1.png", "a/../../cat/1.png"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_path_out_of_the_archive_is_refused(name: str, pack: "type") -> None:
    with pytest.raises(DataError, match="not a path inside"):
        read(pack({**GOOD, name: png()}))


def tar_of(compression: str = "", **attributes: object) -> io.BytesIO:
    """Tar of an empty member with these attributes."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        member = tarfile.TarInfo("cat/1.png")
        for name, value in attributes.items():
            setattr(member, name, value)
        archive.addfile(member)
    buffer.seek(0)
    return buffer


def zip_of(size: int = 11, method: int = zipfile.ZIP_STORED, mode: int = 0o100644) -> io.BytesIO:
    """Zip of a member of so many zero bytes."""
    member = zipfile.ZipInfo("cat/1.png")
    member.external_attr, member.compress_type = mode << 16, method
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(member, bytes(size))
        archive.writestr("cat/2.png", b"")
    return buffer


HUGE = 50_000_000
TWO: Files = {"cat/1.png": png(), "cat/2.png": png()}
HARMFUL = {
    "link": ("link or a device", lambda: zip_of(mode=0o120777)),
    "symlink": ("link or a device", lambda: tar_of(type=tarfile.SYMTYPE, linkname="/etc/passwd")),
    "hard link": ("link or a device", lambda: tar_of(type=tarfile.LNKTYPE, linkname="/etc/passwd")),
    "device": ("link or a device", lambda: tar_of(type=tarfile.CHRTYPE)),
    "zip": ("more than 0 MB", lambda: zipped({**TWO, "cat/1.png": bytes(HUGE)})),
    "tar": ("more than 0 MB", lambda: tarred({**TWO, "cat/1.png": bytes(HUGE)}, "gz")),
    "header": ("more than 0 MB", lambda: tar_of("gz", pax_headers={"comment": "x" * HUGE})),
    "bzip2": (r"'cat/1\.png' is not deflated", lambda: zip_of(HUGE, zipfile.ZIP_BZIP2)),
    "lzma": (r"'cat/1\.png' is not deflated", lambda: zip_of(HUGE, zipfile.ZIP_LZMA)),
    "pixels": ("has 200 x 200 pixels", lambda: zipped({**TWO, "cat/1.png": png(side=200)})),
}


@pytest.mark.parametrize("harm", HARMFUL)
def test_links_devices_and_bombs_are_refused(harm: str) -> None:
    message, make = HARMFUL[harm]
    archive = make()
    assert len(archive.getvalue()) < 100_000
    with pytest.raises(DataError, match=message):
        read(archive)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_file_too_large_for_a_picture_is_refused_and_others_are_not_read(pack: "type") -> None:
    limits = {"file_bytes": 1000, "unpacked_bytes": 10**9}
    with pytest.raises(DataError, match="has more than 0 MB"):
        read(pack({**TWO, "cat/1.png": bytes(2000)}), **limits)
    assert read(pack({**GOOD, "mine/cat/notes.bin": bytes(2000)}), **limits) == ["cat", "dog"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there are no images"),
        ({"1.png": png()}, "is in no class's folder"),
        ({"cat/1.png": png()}, "class 'cat' has one image"),
        ({**TWO, "cat/1.png": b"GIF89a"}, "'cat/1.png' is not a readable PNG"),
        ({f"cat/{i}.png": png() for i in range(21)}, "more than 20 images"),
        ({f"{c}/{i}.png": png() for c in "abcd" for i in range(2)}, "send at most 3"),
        ({"c\x01t/1.png": png()}, "no name for a class"),
    ],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_files_that_are_no_classes_are_refused(files: Files, message: str, pack: "type") -> None:
    with pytest.raises(DataError, match=message):
        read(pack(files))


SHADES = {"0/1.png": 10, "0/2.png": 20, "1/1.png": 30, "1/2.png": 40}
LISTED: Files = {
    **{name: png(shade) for name, shade in SHADES.items()},
    CLASSES_FILE: b'{"0": "wolf / dog", "1": "cat", "2": "never seen"}',
}


@pytest.mark.parametrize("pack", [zipped, tarred])
@pytest.mark.parametrize("order", [1, -1])
def test_classes_may_be_listed_with_names_and_an_order(pack: "type", order: int) -> None:
    upload = read_upload(pack(dict([*LISTED.items()][::order])), LIMITS, 3, 4)
    assert upload.class_names == ["wolf / dog", "cat"]
    found = zip(upload.labels, upload.images[:, 0].max(axis=(1, 2)), strict=True)
    assert sorted(found) == [(int(name[0]), shade) for name, shade in SHADES.items()]


@pytest.mark.parametrize(
    ("listed", "message"),
    [
        (b'{"0": "cat"}', "folder '1' is not in fineserve-classes.json"),
        (b'{"0": "cat", "1": "cat"}', "calls several folders 'cat'"),
        (b'{"0": "cat", "1": ""}', "'' is no name for a class"),
        (b'["cat", "dog"]', "has to be a JSON object"),
        (b'{"0": 1, "1": 2}', "has to be a JSON object"),
        (b"[" * 100_000, "has to be a JSON object"),
        (b'{"0": "cat", "1": "dog"}' + b" " * 1_000_000, "has to be a JSON object"),
    ],
)
def test_a_list_of_classes_that_cannot_be_used_is_refused(listed: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(zipped({**LISTED, CLASSES_FILE: listed}), unpacked_bytes=10**7)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_saved_dataset_is_refused_with_the_command_that_sends_it(pack: "type") -> None:
    dataset = {"mine/state.json": b"{}", "mine/data-00000-of-00001.arrow": b"rows"}
    for more in ({}, GOOD):
        with pytest.raises(DataError, match="`fineserve tasks create FOLDER` makes them"):
            read(pack({**more, **dataset}))
    assert read(pack({**GOOD, "mine/state.json": b"{}"})) == ["cat", "dog"]


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x1f\x8b garbage", b"BZh9x", bytes(512)])
def test_content_that_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(DataError):
        read(io.BytesIO(content))


ARCHIVES = [
    pack.getvalue()
    for files in (GOOD, LISTED)
    for pack in (zipped(files), tarred(files), tarred(files, "gz"))
]


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    whole=st.sampled_from(ARCHIVES),
    edits=st.lists(EDIT, max_size=5),
    length=st.none() | st.floats(0, 1),
)
def test_whatever_the_bytes_it_is_read_or_refused(
    whole: bytes, edits: list[Edit], length: float | None
) -> None:
    try:
        upload = read_upload(io.BytesIO(damaged(whole, edits, length)), LIMITS, 3, 4)
    except DataError:
        return
    assert upload.images.dtype == np.uint8
    assert len(upload.images) == len(upload.labels) <= LIMITS.images


def test_a_name_that_comes_twice_is_refused() -> None:
    packed = zipped({**TWO, "cat/3.png": png()}).getvalue().replace(b"cat/3.png", b"cat/2.png")
    with pytest.raises(DataError, match="is in it more than once"):
        read(io.BytesIO(packed))
