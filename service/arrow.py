"""The Arrow files of a Hugging Face dataset, as its `save_to_disk` writes them: images and classes.

Read message by message, with full validation. A compressed message is refused, since how much it
unpacks to is known only when it is unpacked.
"""

import json
import struct
from collections.abc import Iterator
from typing import IO, Any

UNUSABLE = (
    "is not a dataset with an Image and a ClassLabel column; save one with `save_to_disk` of "
    "Hugging Face datasets"
)
RECORD_BATCH_HEADER, COMPRESSION = 2, 3
"""Numbers of two fields, of Message and RecordBatch, in Arrow's format/Message.fbs."""


class ArrowError(ValueError):
    """The message says what is wrong, and goes on after the file's name."""


def labelled_images(opened: IO[bytes]) -> Iterator[tuple[str, bytes]]:
    """Class name and encoded image of every row. Raises ArrowError and what pyarrow raises."""
    import pyarrow as pa  # takes 40 MB, and most services never see a dataset

    messages = pa.ipc.MessageReader.open_stream(opened)
    first = next(messages, None)
    if first is None:
        raise ArrowError(UNUSABLE)
    schema = pa.ipc.read_schema(first)
    image, label, names = _columns(schema)
    row = 0
    for message in messages:
        if message.type != "record batch":
            raise ArrowError(f"has a {message.type} in it; save images and labels alone")
        if _compressed(message.metadata.to_pybytes()):
            raise ArrowError("is compressed; save the dataset without compression")
        batch = pa.ipc.read_record_batch(message, schema)
        batch.validate(full=True)
        for pixels, number in zip(batch.column(image), batch.column(label), strict=True):
            content, of_class = pixels["bytes"].as_py(), number.as_py()
            if content is None:
                raise ArrowError(f"has no image in row {row}; embed it, as `save_to_disk` does")
            if of_class is None or not 0 <= of_class < len(names):
                raise ArrowError(f"has no class in row {row}; label it or leave it out")
            yield names[of_class], content
            row += 1


def _columns(schema: Any) -> tuple[str, str, list[str]]:
    """Of images, of labels, and the names of classes."""
    import pyarrow as pa

    try:
        described = json.loads(schema.metadata[b"huggingface"])["info"]["features"]
        kinds = {feature["_type"]: column for column, feature in described.items()}
        image, label = kinds["Image"], kinds["ClassLabel"]
        names = described[label]["names"]
        content = schema.field(image).type.field("bytes").type
        of_classes = schema.field(label).type
    except (AttributeError, KeyError, TypeError, ValueError):
        raise ArrowError(UNUSABLE) from None
    binary = pa.types.is_binary(content) or pa.types.is_large_binary(content)
    if not (binary and pa.types.is_integer(of_classes) and all(isinstance(n, str) for n in names)):
        raise ArrowError(UNUSABLE)
    return image, label, names


def _compressed(message: bytes) -> bool:
    """Whether a record batch's header, a flatbuffer that Arrow has verified, tells so."""
    (root,) = struct.unpack_from("<I", message)
    header = _field(message, root, RECORD_BATCH_HEADER)
    assert header is not None
    (offset,) = struct.unpack_from("<I", message, header)
    return _field(message, header + offset, COMPRESSION) is not None


def _field(flatbuffer: bytes, table: int, number: int) -> int | None:
    """Where a field of a table is; None if it has not been written."""
    (back,) = struct.unpack_from("<i", flatbuffer, table)
    vtable, entry = table - back, 4 + 2 * number
    (size,) = struct.unpack_from("<H", flatbuffer, vtable)
    if entry >= size:
        return None
    (offset,) = struct.unpack_from("<H", flatbuffer, vtable + entry)
    return table + offset if offset else None
