"""Files that were read lately, by their SHA-256, on a disk of this host."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path

from learngenes.files import write_file

SLACK = 0.1
"""Share of the room that is made at once, and that a process may fill before it looks again: every
look is at every file."""


class Cache:
    """About so many bytes of files, of which the ones read longest ago go first.

    What is there is what its name says: it was checked when it was put, and nobody else writes.
    """

    def __init__(self, folder: Path, most_bytes: int) -> None:
        self._folder, self._most_bytes = folder, most_bytes
        self._changing = threading.Lock()
        self._room = 0.0
        """Bytes to write until the next look at what is there."""

    def path(self, sha256: str) -> Path | None:
        """Path of a file; None where it is not there."""
        path = self._folder / sha256
        return path if path.exists() else None

    def get(self, sha256: str, fetch: Callable[[], bytes]) -> bytes:
        """Content of a file, fetched unless it is there."""
        path = self._folder / sha256
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            os.utime(path)
            return content
        content = fetch()
        with self._changing:
            write_file(path, content)
            self._room -= len(content)
            if self._room < 0:
                self._make_room(path)
        return content

    def _make_room(self, newest: Path) -> None:
        """Delete what was read longest ago; the newest stays, however large."""
        known = []
        for path in self._folder.iterdir():
            with contextlib.suppress(FileNotFoundError):  # another process makes room, too
                stat = path.stat()
                known.append((stat.st_mtime, stat.st_size, path))
        taken, slack = sum(size for _, size, _ in known), SLACK * self._most_bytes
        wanted = self._most_bytes if taken <= self._most_bytes else self._most_bytes - slack
        for _, size, path in sorted(known):
            if taken <= wanted:
                break
            if path != newest:
                path.unlink(missing_ok=True)
                taken -= size
        self._room = min(self._most_bytes - taken, slack)
