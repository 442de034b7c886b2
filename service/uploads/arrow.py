"""The Arrow files of a Hugging Face dataset, as its `save_to_disk` writes them: images and classes.

Read by Python alone, from Arrow's streaming format
(https://arrow.apache.org/docs/format/Columnar.html): at some files that somebody has tampered with
pyarrow 26 and nanoarrow 0.9, which are C++ and C, end the whole process.
"""

import itertools
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from flatbuffers import number_types
from flatbuffers.table import Table
from numpy.typing import NDArray

CONTINUATION = 0xFFFFFFFF
MOST_HEADER_BYTES, MOST_BODY_BYTES = 4_000_000, 128_000_000
"""Of one message: a body of Hugging Face datasets' has a hundred images."""
MOST_MESSAGES = 100_000
MOST_COLUMNS, MOST_PAIRS, LONGEST_NAME = 1000, 100, 1000
"""Of a schema; it may claim any number, of texts that are all the same."""
FEATURES = b"huggingface"
SCHEMA, RECORD_BATCH = 1, 3
"""Of the union MessageHeader in Arrow's format/Message.fbs. The numbers of fields are from there,
too, and from format/Schema.fbs."""
INT, BINARY, STRUCT, LARGE_BINARY = 2, 4, 13, 19
BUFFERS = {1: 0, **dict.fromkeys((STRUCT, 16), 1), **dict.fromkeys((4, 5, 19, 20), 3)}
BUFFERS |= dict.fromkeys((INT, 3, 6, 7, 8, 9, 10, 11, 12, 15, 17, 18, 21), 2)
"""Of a column of a type, without its children's."""
OFFSETS: dict[int, np.dtype[Any]] = {BINARY: np.dtype("<i4"), LARGE_BINARY: np.dtype("<i8")}

UNUSABLE = (
    "is not a dataset with an Image and a ClassLabel column; save one with `save_to_disk` of "
    "Hugging Face datasets"
)
BROKEN = "is not a whole Arrow stream; save the dataset again"


class ArrowError(ValueError):
    """The message says what is wrong, and goes on after the file's name."""


@dataclass(frozen=True)
class _Columns:
    image: "_Column"
    content: "_Column"
    """Of the image: its bytes."""
    label: "_Column"
    names: list[str]


@dataclass(frozen=True)
class _Column:
    """node, buffer: the first ones of a record batch that are its own."""

    name: str
    kind: int
    field: "_Fields"
    node: int
    buffer: int


def labelled_images(opened: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Class name and encoded image of every row. Raises ArrowError."""
    try:
        columns: _Columns | None = None
        for kind, header, body in _messages(opened):
            if columns is None:
                if kind != SCHEMA:
                    raise ArrowError(BROKEN)
                columns = _columns(header)
            elif kind == RECORD_BATCH:
                yield from _rows(header, body, columns)
            else:
                raise ArrowError("has dictionaries in it; save images and labels alone")
        if columns is None:
            raise ArrowError(UNUSABLE)
    except ArrowError:
        raise
    except (struct.error, IndexError, OverflowError, TypeError, ValueError, RecursionError) as e:
        raise ArrowError(BROKEN) from e


def _messages(opened: IO[bytes]) -> Iterator[tuple[int, "_Fields", bytes]]:
    """Kind of header, header and body, until the stream ends."""
    for _ in range(MOST_MESSAGES):
        start = opened.read(8)
        if not start:
            return
        continuation, size = struct.unpack("<II", start)
        if size == 0:
            return
        if continuation != CONTINUATION or size > MOST_HEADER_BYTES:
            raise ArrowError(BROKEN)
        message = _Fields.root(_exactly(opened, size))
        body_size = message.number(3)
        if body_size > MOST_BODY_BYTES:
            raise ArrowError(
                f"has more than {MOST_BODY_BYTES / 1e6:.0f} MB in one batch of rows; scale the "
                "images down, they are scaled to the family's size anyway"
            )
        yield message.number(1, "Uint8"), message.table(2), _exactly(opened, body_size)
    raise ArrowError(f"has more than {MOST_MESSAGES} batches of rows; save it in larger ones")


def _exactly(opened: IO[bytes], size: int) -> bytes:
    content = opened.read(size) if size >= 0 else b""
    if len(content) != size:
        raise ArrowError(BROKEN)
    return content


def _columns(schema: "_Fields") -> _Columns:
    if schema.number(0, "Int16"):
        raise ArrowError("is of a big-endian machine; save it on another one")
    columns = {column.name: column for column in _flattened(schema)}
    pairs = itertools.islice(schema.tables(2), MOST_PAIRS)
    described = next((pair.raw(1) for pair in pairs if pair.raw(0) == FEATURES), b"")
    try:
        features = json.loads(described)["info"]["features"]
        image_name, label_name = (_only(kind, features) for kind in ("Image", "ClassLabel"))
        names = features[label_name]["names"]
        image, label = columns[image_name], columns[label_name]
        content = columns[f"{image_name}/bytes"]
    except ArrowError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ArrowError(UNUSABLE) from None
    if (image.kind, label.kind) != (STRUCT, INT) or content.kind not in OFFSETS:
        raise ArrowError(UNUSABLE)
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise ArrowError(UNUSABLE)
    return _Columns(image, content, label, names)


def _only(kind: str, features: Any) -> str:
    """The column of a kind: what a client has said, as it has come."""
    of_kind = [
        name
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == kind
    ]
    if not of_kind:
        raise ArrowError(UNUSABLE)
    if len(of_kind) > 1:
        raise ArrowError(f"has several {kind} columns, {', '.join(of_kind)}; drop all but one")
    return str(of_kind[0])


def _flattened(schema: "_Fields") -> list[_Column]:
    """All columns in the order of a record batch, children after their parents: parent/child."""
    found: list[_Column] = []
    buffers = 0

    def walk(field: "_Fields", prefix: str) -> None:
        nonlocal buffers
        kind = field.number(2, "Uint8")
        if kind not in BUFFERS or len(found) == MOST_COLUMNS:
            raise ArrowError("has columns beside images and labels that cannot be read; drop them")
        name = prefix + field.raw(0)[: LONGEST_NAME + 1].decode()
        if len(name) > LONGEST_NAME:
            raise ArrowError(BROKEN)
        found.append(_Column(name, kind, field, len(found), buffers))
        buffers += BUFFERS[kind]
        for child in field.tables(5):
            walk(child, f"{name}/")

    for field in schema.tables(1):
        walk(field, "")
    return found


def _rows(batch: "_Fields", body: bytes, columns: _Columns) -> Iterator[tuple[str, bytes]]:
    if batch.has(3):
        raise ArrowError("is compressed; save the dataset without compression")
    count = batch.number(0)
    for column in (columns.image, columns.content, columns.label):
        length, nulls = batch.pair(1, column.node)
        if not 0 <= length == count:
            raise ArrowError(BROKEN)
        if nulls:
            raise ArrowError(
                "has rows without an image or a class; leave them out, and embed what is a path"
            )

    def buffer(number: int) -> memoryview:
        offset, size = batch.pair(2, number)
        if not 0 <= offset <= offset + size <= len(body):
            raise ArrowError(BROKEN)
        return memoryview(body)[offset : offset + size]

    numbers = _array(buffer(columns.label.buffer + 1), _dtype(columns.label))
    offsets = _array(buffer(columns.content.buffer + 1), OFFSETS[columns.content.kind])
    content = buffer(columns.content.buffer + 2)
    if len(numbers) < count or len(offsets) < count + 1:
        raise ArrowError(BROKEN)
    for row in range(count):
        start, end, number = int(offsets[row]), int(offsets[row + 1]), int(numbers[row])
        if not 0 <= start <= end <= len(content):
            raise ArrowError(BROKEN)
        if not 0 <= number < len(columns.names):
            raise ArrowError(f"has a row of class {number}, which has no name; label it")
        yield columns.names[number], bytes(content[start:end])


def _dtype(column: _Column) -> np.dtype[Any]:
    """Of integers."""
    described = column.field.table(3)
    width, signed = described.number(0, "Int32"), described.number(1, "Bool")
    return np.dtype(f"<{'i' if signed else 'u'}{width // 8}")


def _array(content: memoryview, dtype: np.dtype[Any]) -> NDArray[Any]:
    return np.frombuffer(content[: len(content) // dtype.itemsize * dtype.itemsize], dtype)


class _Fields:
    """A flatbuffer's table, its fields by their number; nothing that it says has been verified."""

    def __init__(self, content: bytes, position: int) -> None:
        self._content, self._table = content, Table(content, position)

    @classmethod
    def root(cls, content: bytes) -> "_Fields":
        return cls(content, struct.unpack_from("<I", content)[0])

    def _at(self, number: int) -> int:
        """From the table's start; 0 if the field has not been written."""
        return int(self._table.Offset(4 + 2 * number))

    def has(self, number: int) -> bool:
        return self._at(number) != 0

    def number(self, number: int, kind: str = "Int64") -> int:
        return int(self._table.GetSlot(4 + 2 * number, 0, getattr(number_types, f"{kind}Flags")))

    def raw(self, number: int) -> bytes:
        """Of a text."""
        at = self._at(number)
        content: bytes = self._table.String(self._table.Pos + at) if at else b""
        return content

    def table(self, number: int) -> "_Fields":
        at = self._at(number)
        if not at:
            raise ArrowError(BROKEN)
        return _Fields(self._content, self._table.Indirect(self._table.Pos + at))

    def tables(self, number: int) -> Iterator["_Fields"]:
        at = self._at(number)
        for index in range(self._table.VectorLen(at) if at else 0):
            position = self._table.Vector(at) + 4 * index
            yield _Fields(self._content, self._table.Indirect(position))

    def pair(self, number: int, index: int) -> tuple[int, int]:
        """Two int64, at `index` of a vector of such."""
        at = self._at(number)
        if not at or index >= self._table.VectorLen(at):
            raise ArrowError(BROKEN)
        found = struct.unpack_from("<qq", self._content, self._table.Vector(at) + 16 * index)
        return int(found[0]), int(found[1])
