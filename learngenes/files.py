"""Atomic writes: a reader sees the old file or the new one, also after a crash."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replaced(path: Path, scratch: Path | None = None) -> Iterator[Path]:
    """A new path to write a file or a directory to, which takes the place of `path` at the end.

    It is flushed to disk before, and removed where anything fails. It lies beside `path`, or in
    `scratch`, on the same disk. Raises OSError where `path` is a directory that is not empty.
    """
    new = (scratch or path.parent) / f"{path.name}.{uuid.uuid4().hex}"
    for folder in (new.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    try:
        yield new
        for written in (new, *new.rglob("*")):
            _flush(written)
        new.replace(path)
    except BaseException:
        if new.is_dir():
            shutil.rmtree(new, ignore_errors=True)
        else:
            new.unlink(missing_ok=True)
        raise
    _flush(path.parent)


def write_file(path: Path, content: bytes, permissions: int = 0o666) -> None:
    def opened(name: str, flags: int) -> int:
        return os.open(name, flags, permissions)

    with replaced(path) as new, open(new, "xb", opener=opened) as file:
        file.write(content)


def _flush(path: Path) -> None:
    """Flush a file's content, or a directory's names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
