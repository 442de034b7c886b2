"""Archives that clients send: what is in order is read, and nothing else does any harm."""

import dataclasses
import io
import json
import struct
import tarfile
import zipfile
from pathlib import Path
from typing import IO

import datasets
import flatbuffers
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from service.uploads.archives import UploadError, UploadLimits, preview, read_upload
from service.uploads.arrow import ArrowError, labelled_images

LIMITS = UploadLimits(
    unpacked_bytes=200_000, images=20, classes=3, scaled_bytes=10_000, image_pixels=10_000
)
Files = dict[str, bytes]


def png(shade: int = 100, side: int = 8, mode: str = "RGB", kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), shade if mode == "L" else (shade, 0, 0)).save(buffer, kind)
    return buffer.getvalue()


def zipped(files: Files) -> io.BytesIO:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer


def tarred(files: Files, compression: str = "") -> io.BytesIO:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=f"w:{compression}") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    buffer.seek(0)
    return buffer


def read(file: IO[bytes], limits: UploadLimits = LIMITS, channels: int = 3) -> list[str]:
    return read_upload(file, limits, channels, 4).class_names


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
    assert sheet.size == (40, 8)


def test_what_is_kept_in_memory_has_a_limit() -> None:
    limits = dataclasses.replace(LIMITS, scaled_bytes=3 * 3 * 4 * 4)
    with pytest.raises(UploadError, match="4 images of 3 x 4 x 4 are more than 0 MB"):
        read(zipped(GOOD), limits)
    assert read(zipped(GOOD), limits, channels=1) == ["cat", "dog"]


def test_what_is_decoded_has_a_limit() -> None:
    limits = dataclasses.replace(LIMITS, all_pixels=2 * 8 * 8 + 30 * 30 - 1)
    with pytest.raises(UploadError, match=r"first 3 images have more than 1\.0e\+03 pixels"):
        read(zipped(GOOD), limits)


def test_pictures_are_taken_as_a_viewer_shows_them() -> None:
    clear = io.BytesIO()
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(clear, "PNG")
    files = {"cat/1.png": clear.getvalue(), "cat/2.png": png(10)}
    images = read_upload(zipped(files), LIMITS, 3, 4).images
    assert images[0].min() == 255


@pytest.mark.parametrize("name", ["../cat/1.png", "/cat/1.png", "a/../../cat/1.png", "a\\b/1.png"])
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_path_out_of_the_archive_is_refused(name: str, pack: "type") -> None:
    with pytest.raises(UploadError, match="not a path inside"):
        read(pack({**GOOD, name: png()}))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE])
def test_links_and_devices_in_a_tar_are_refused(kind: bytes) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo("cat/1.png")
        member.type, member.linkname = kind, "/etc/passwd"
        archive.addfile(member)
    buffer.seek(0)
    with pytest.raises(UploadError, match="link or a device"):
        read(buffer)


def test_links_in_a_zip_are_refused() -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        member = zipfile.ZipInfo("cat/1.png")
        member.external_attr = 0o120777 << 16
        archive.writestr(member, "/etc/passwd")
    with pytest.raises(UploadError, match="link or a device"):
        read(buffer)


@pytest.mark.parametrize("pack", [zipped, lambda files: tarred(files, "gz")])
def test_bombs_are_refused(pack: "type") -> None:
    bomb = pack({"cat/1.png": bytes(50_000_000)})
    assert len(bomb.getvalue()) < 100_000
    with pytest.raises(UploadError, match="more than 0 MB"):
        read(bomb)


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_zip_that_is_unpacked_without_a_limit_is_refused(method: int) -> None:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        archive.writestr("cat/1.png", bytes(50_000_000))
    with pytest.raises(UploadError, match=r"'cat/1\.png' is not deflated"):
        read(buffer)


@pytest.mark.parametrize("pack", [zipped, tarred])
def test_a_file_too_large_for_a_picture_is_refused_and_others_are_not_read(pack: "type") -> None:
    limits = dataclasses.replace(LIMITS, file_bytes=1000, unpacked_bytes=10**9)
    with pytest.raises(UploadError, match="has more than 0 MB"):
        read(pack({"cat/1.png": bytes(2000)}), limits)
    assert read(pack({**GOOD, "mine/cat/notes.bin": bytes(2000)}), limits) == ["cat", "dog"]


def test_a_bomb_in_a_tars_header_is_refused() -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT) as archive:
        member = tarfile.TarInfo("cat/1.png")
        member.pax_headers = {"comment": "x" * 50_000_000}
        archive.addfile(member)
    buffer.seek(0)
    with pytest.raises(UploadError, match="more than 0 MB"):
        read(buffer)


def test_a_picture_of_too_many_pixels_is_refused_before_it_is_decoded() -> None:
    with pytest.raises(UploadError, match="has 200 x 200 pixels"):
        read(zipped({"cat/1.png": png(side=200)}))


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "there are no images"),
        ({"1.png": png()}, "is in no folder"),
        ({"cat/1.png": png()}, "class 'cat' has one image"),
        ({"cat/1.png": b"GIF89a"}, "'cat/1.png' is not a readable PNG"),
        ({f"cat/{i}.png": png() for i in range(21)}, "more than 20 images"),
        ({f"{c}/{i}.png": png() for c in "abcd" for i in range(2)}, "send at most 3"),
        ({"c\x01t/1.png": png()}, "no name for a class"),
    ],
)
@pytest.mark.parametrize("pack", [zipped, tarred])
def test_what_is_wrong_is_said(files: Files, message: str, pack: "type") -> None:
    with pytest.raises(UploadError, match=message):
        read(pack(files))


def saved(directory: Path, splits: tuple[str, ...] = (), classes: int = 2) -> Files:
    """The files that `save_to_disk` writes, of one dataset or of several splits."""
    names = ["cat", "dog / wolf", "emu"][:classes]
    features = datasets.Features(
        {"id": datasets.Value("int64"), "label": datasets.ClassLabel(names=names)}
        | {"image": datasets.Image()}
    )
    columns = {
        "id": range(4),
        "image": [{"bytes": png(10 * i + 10)} for i in range(4)],
        "label": [0, 1, 0, 1],
    }
    data = datasets.Dataset.from_dict(columns, features)
    whole = datasets.DatasetDict(dict.fromkeys(splits, data)) if splits else data
    whole.save_to_disk(str(directory / "mine"), num_shards=dict.fromkeys(splits, 2) or 2)
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("pack", [zipped, lambda files: tarred(files, "gz")])
@pytest.mark.parametrize("splits", [(), ("validation",), ("test", "train")])
def test_what_hugging_face_datasets_has_saved(
    tmp_path: Path, splits: tuple[str, ...], pack: "type"
) -> None:
    upload = read_upload(pack(saved(tmp_path, splits, classes=3)), LIMITS, 3, 4)
    assert upload.class_names == ["cat", "dog / wolf"]
    assert [*upload.labels] == [0, 1, 0, 1]
    assert [*upload.images[:, 0].max(axis=(1, 2))] == [10, 20, 30, 40]


def test_of_several_splits_one_is_for_training(tmp_path: Path) -> None:
    files = saved(tmp_path, ("a", "b"))
    with pytest.raises(UploadError, match=r"several datasets \(mine/a, mine/b\)"):
        read(zipped(files))


def test_a_dataset_with_images_beside_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UploadError, match="image files beside a dataset"):
        read(tarred({**saved(tmp_path), **GOOD}))


def test_what_lies_beside_a_dataset_is_not_its_own(tmp_path: Path) -> None:
    files = saved(tmp_path)
    cache = {"mine/cache-0123.arrow": b"of Hugging Face datasets", "mine/cat/state.json": b"[]"}
    assert read(tarred({**files, **cache})) == ["cat", "dog / wolf"]
    assert read(zipped({**GOOD, "mine/state.json": b"{}"})) == ["cat", "dog"]
    first = next(name for name in files if name.endswith("-00000-of-00002.arrow"))
    with pytest.raises(UploadError, match=f"'{first}' is missing"):
        read(zipped({name: content for name, content in files.items() if name != first}))
    with pytest.raises(UploadError, match=r"there is no state\.json"):
        read(zipped({name: content for name, content in files.items() if "state" not in name}))


@pytest.mark.parametrize("label", [pa.uint8(), pa.int16(), pa.uint64()])
@pytest.mark.parametrize("content", [pa.binary(), pa.large_binary()])
def test_columns_may_be_of_other_widths_and_have_others_beside_them(
    label: pa.DataType, content: pa.DataType
) -> None:
    columns = {
        "text": ["a", None, "c"],
        "box": [[[1.0, 2.0]], None, []],
        "image": [{"bytes": png(10 * i)} for i in range(3)],
        "where": [{"x": 1, "y": [True]}, {"x": None, "y": []}, None],
        "label": [1, 0, 1],
    }
    types = {
        "text": pa.string(),
        "box": pa.list_(pa.list_(pa.float32(), 2)),
        "image": pa.struct([("path", pa.string()), ("bytes", content)]),
        "where": pa.struct([("x", pa.int8()), ("y", pa.list_(pa.bool_()))]),
        "label": label,
    }
    named = {"_type": "ClassLabel", "names": ["cat", "dog"]}
    features = {"label": named, "where": {"x": {"_type": "Value"}}, "box": [{"_type": "Value"}]}
    stream = arrow(columns, types, {**features, "image": {"_type": "Image"}}, rows_in_a_batch=2)
    assert [*labelled_images(io.BytesIO(stream))] == [
        ("dog", png(0)),
        ("cat", png(10)),
        ("dog", png(20)),
    ]


def test_limits_hold_for_datasets(tmp_path: Path) -> None:
    files = saved(tmp_path)
    for change, message in (
        ({"images": 3}, "more than 3 images"),
        ({"classes": 1}, "send at most 1"),
        ({"file_bytes": 20}, r"arrow, row 0' has more than 0 MB"),
        ({"unpacked_bytes": 500}, "unpacks to more than 0 MB"),
        ({"image_pixels": 10}, "arrow, row 0' has 8 x 8 pixels"),
    ):
        for pack in (zipped, tarred):
            with pytest.raises(UploadError, match=message):
                read(pack(files), dataclasses.replace(LIMITS, **change))


IMAGE_COLUMN = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FEATURES = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": ["cat"]}}
STATE: Files = {"mine/state.json": b'{"_data_files": [{"filename": "data.arrow"}]}'}
CAT = {"bytes": png(), "path": None}


def arrow(
    columns: dict[str, list[object]],
    types: dict[str, pa.DataType] | None = None,
    features: object = FEATURES,
    compression: str | None = None,
    rows_in_a_batch: int | None = None,
) -> bytes:
    described = {"huggingface": json.dumps({"info": {"features": features}})}
    types = {"image": IMAGE_COLUMN, "label": pa.int64()} | (types or {})
    schema = pa.schema([(name, types[name]) for name in columns], described)
    buffer = io.BytesIO()
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with pa.ipc.new_stream(buffer, schema, options=options) as writer:
        writer.write_table(pa.table(columns, schema=schema), rows_in_a_batch)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a dataset with an Image and a ClassLabel"),
        (b"nothing of Arrow's", "not a whole Arrow stream"),
        (arrow({"image": [CAT], "label": [0]})[:-700], "not a whole Arrow stream"),
        (arrow({"image": [CAT], "label": [0]}, features=["image"]), "not a dataset with"),
        (arrow({"image": [CAT], "label": [0]}, features={"image": {}}), "not a dataset with"),
        (arrow({"image": ["a"], "label": [0]}, {"image": pa.string()}), "not a dataset with"),
        (arrow({"image": [CAT], "label": ["a"]}, {"label": pa.string()}), "not a dataset with"),
        (arrow({"label": [0]}), "not a dataset with"),
        (arrow({"image": [CAT, CAT], "label": [0, 1]}), "a row of class 1, which has no name"),
        (arrow({"image": [CAT, CAT], "label": [0, None]}), "rows without an image or a class"),
        (arrow({"image": [{"path": "/etc/passwd"}], "label": [0]}), "embed what is a path"),
        (arrow({"image": [None], "label": [0]}), "rows without an image"),
        (arrow({"image": [CAT], "label": [0]}, compression="zstd"), "is compressed"),
        (arrow({"image": [CAT], "label": [0]}, compression="lz4"), "is compressed"),
        (
            arrow(
                {"image": [CAT], "label": [0], "more": ["x"]},
                {"more": pa.dictionary(pa.int8(), pa.string())},
            ),
            "has dictionaries in it",
        ),
        (
            arrow(
                {"image": [CAT], "label": [0], "more": ["x"]},
                {"more": pa.string_view()},
            ),
            "columns beside images and labels that cannot be read",
        ),
        (
            arrow(
                {"image": [CAT], "label": [0], **{f"{i}": [0] for i in range(1000)}},
                {f"{i}": pa.int8() for i in range(1000)},
            ),
            "columns beside images and labels that cannot be read",
        ),
        (
            arrow({"image": [CAT], "label": [0], "a" * 1001: [0]}, {"a" * 1001: pa.int8()}),
            "not a whole Arrow stream",
        ),
        (arrow({"image": [], "label": []}), "there are no images"),
        (
            arrow(
                {"image": [CAT], "label": [0], "more": [0]},
                {"more": pa.int8()},
                {**FEATURES, "more": FEATURES["label"]},
            ),
            "several ClassLabel columns, label, more; drop all but one",
        ),
        (
            arrow(
                {"image": [CAT], "label": [0]},
                features=FEATURES | {"label": {"_type": "ClassLabel", "names": 3}},
            ),
            "not a dataset with",
        ),
        (
            arrow(
                {"image": [CAT], "label": [0]},
                features=FEATURES | {"label": {"_type": "ClassLabel", "names": [""]}},
            ),
            "'' is no name for a class",
        ),
    ],
)
def test_a_dataset_that_is_none_says_why(content: bytes, message: str) -> None:
    with pytest.raises(UploadError, match=message):
        read(zipped({"mine/data.arrow": content, **STATE}))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"\x1f\x8b garbage", b"BZh9x", bytes(512)])
def test_what_is_no_archive_is_refused(content: bytes) -> None:
    with pytest.raises(UploadError):
        read(io.BytesIO(content))


DATASET: Files = {"mine/data.arrow": arrow({"image": [CAT] * 3, "label": [0] * 3}), **STATE}
ARCHIVES = [
    pack.getvalue()
    for files in (GOOD, DATASET)
    for pack in (zipped(files), tarred(files), tarred(files, "gz"))
]


def damaged(whole: bytes, edits: list[tuple[float, bytes]], length: float | None) -> io.BytesIO:
    """Overwritten at shares of its length, and cut to one."""
    content = bytearray(whole)
    for share, replacement in edits:
        at = int(share * len(content))
        content[at : at + len(replacement)] = replacement
    if length is not None:
        content = content[: int(length * len(content))]
    return io.BytesIO(bytes(content))


@settings(max_examples=400, deadline=None, derandomize=True)
@given(
    archive=st.sampled_from(ARCHIVES),
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=9)), max_size=5),
    length=st.none() | st.floats(0, 1),
)
def test_whatever_the_bytes_it_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory,
    archive: bytes,
    edits: list[tuple[float, bytes]],
    length: float | None,
) -> None:
    try:
        upload = read_upload(damaged(archive, edits, length), LIMITS, 3, 4)
    except UploadError:
        return
    assert upload.images.dtype == np.uint8
    assert len(upload.images) == len(upload.labels) <= LIMITS.images
    assert all(Path(name).name == name for name in upload.class_names)


@settings(max_examples=1000, deadline=None, derandomize=True)
@given(
    edits=st.lists(st.tuples(st.floats(0, 0.999), st.binary(min_size=1, max_size=9)), max_size=5),
    length=st.none() | st.floats(0, 1),
)
def test_whatever_an_arrow_stream_says_it_is_read_or_refused(
    edits: list[tuple[float, bytes]], length: float | None
) -> None:
    try:
        rows = [*labelled_images(damaged(DATASET["mine/data.arrow"], edits, length))]
    except ArrowError:
        return
    assert len(rows) <= 3
    assert {type(image) for _, image in rows} <= {bytes}


@pytest.mark.parametrize(
    ("limit", "message"),
    [
        ("MOST_HEADER_BYTES", "not a whole Arrow stream"),
        ("MOST_BODY_BYTES", "MB in one batch of rows; scale the images down"),
        ("MOST_MESSAGES", "more than 2 batches of rows"),
    ],
)
def test_messages_have_limits(limit: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(f"service.uploads.arrow.{limit}", 2)
    with pytest.raises(ArrowError, match=message):
        list(labelled_images(io.BytesIO(DATASET["mine/data.arrow"])))


def test_a_dataset_of_a_big_endian_machine_is_refused() -> None:
    builder = flatbuffers.Builder()
    builder.StartObject(4)
    builder.PrependInt16Slot(0, 1, 0)
    schema = builder.EndObject()
    builder.StartObject(5)
    builder.PrependUint8Slot(1, 1, 0)
    builder.PrependUOffsetTRelativeSlot(2, schema, 0)
    builder.Finish(builder.EndObject())
    header = bytes(builder.Output())
    stream = struct.pack("<II", 0xFFFFFFFF, len(header)) + header
    with pytest.raises(ArrowError, match="big-endian"):
        list(labelled_images(io.BytesIO(stream)))
