"""Artifacts as directories of one disk, which appear whole by being renamed."""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from learngenes.files import replaced, write_file
from registry.errors import ArtifactError, StorageFull
from registry.store.artifacts import (
    MANIFEST,
    READ_SECONDS,
    TEMPORARY,
    UNFINISHED_SECONDS,
    ArtifactStore,
    manifest_of,
    require_whole,
)

FULL = {errno.ENOSPC, errno.EDQUOT}
THERE = {errno.ENOTEMPTY, errno.EEXIST}
CHECKPOINTS = "checkpoint-*"


class DirectoryStore(ArtifactStore):
    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        self._incoming = root / "incoming"

    def put(self, name: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
        target = self.root / name
        if (target / MANIFEST).exists():
            return
        with self._room_for(name):
            if target.exists():  # without a manifest it is of no use to anybody
                aside = self._incoming / f"unfinished-{uuid.uuid4().hex}"
                self._incoming.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # another was first
                    target.rename(aside)
                if (aside / MANIFEST).exists() and not target.exists():  # it was finished meanwhile
                    aside.rename(target)
                    return
                shutil.rmtree(aside, ignore_errors=True)
            try:
                with replaced(target, scratch=self._incoming) as new:
                    new.mkdir()
                    manifest = manifest_of(files, description)
                    for file, content in {**files, MANIFEST: manifest}.items():
                        (new / file).write_bytes(content)
            except OSError as error:
                if error.errno not in THERE:  # else another worker was first
                    raise

    def replace_description(self, name: str, description: Mapping[str, Any]) -> None:
        with self._room_for(name):
            write_file(self.root / name / MANIFEST, manifest_of({}, description))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        self._incoming.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._incoming, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    @contextlib.contextmanager
    def _room_for(self, name: str) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno in FULL:
                raise StorageFull(f"there is no room for {name}") from error
            raise

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.root).free

    def used_bytes(self) -> dict[str, int]:
        return {folder.name: _bytes_in(folder) for folder in self.root.iterdir() if folder.is_dir()}

    def read_all(self, name: str, files: Sequence[str]) -> list[bytes]:
        try:
            described = json.loads((self.root / name / MANIFEST).read_bytes())["sha256"]
        except (OSError, KeyError, ValueError) as error:
            raise ArtifactError(f"{name}/{files[0]} cannot be read: {error}") from error
        return [self._read(name, file, described) for file in files]

    def _read(self, name: str, file: str, described: Mapping[str, str]) -> bytes:
        try:
            content, expected = (self.root / name / file).read_bytes(), described[file]
        except (OSError, KeyError) as error:
            raise ArtifactError(f"{name}/{file} cannot be read: {error}") from error
        return require_whole(name, file, content, expected)

    def checked_path(self, name: str, file: str) -> Path | None:
        path = self.root / name / file
        if not path.exists():
            return None
        try:
            expected = self.describe(name)["sha256"][file]
            with path.open("rb") as content:
                if hashlib.file_digest(content, "sha256").hexdigest() == expected:
                    return path
        except (ArtifactError, KeyError, FileNotFoundError):
            pass
        self.delete(name)
        return None

    def describe(self, name: str) -> dict[str, Any]:
        try:
            return cast(dict[str, Any], json.loads((self.root / name / MANIFEST).read_bytes()))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{name} cannot be read: {error}") from error

    def has(self, name: str, file: str = MANIFEST) -> bool:
        return (self.root / name / file).exists()

    def ids(self, kind: str) -> list[str]:
        folder = self.root / kind
        return sorted(path.name for path in folder.iterdir()) if folder.exists() else []

    def idle_seconds(self, name: str) -> float:
        folder = self.root / name
        return _idle_seconds(folder, *folder.glob("*"))

    def checkpoint(self, name: str) -> Path:
        return self.root / name

    def keep_checkpoint(self, name: str) -> None:
        """It is where others see it already."""

    def drop_checkpoints(self, name: str) -> None:
        for left in (self.root / name).glob(CHECKPOINTS):
            left.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # there are artifacts in it
            (self.root / name).rmdir()

    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def sweep(self, older_than_seconds: float) -> int:
        old_seconds = max(older_than_seconds, READ_SECONDS)
        below = {kind: "/*" * (parts - 1) for kind, parts in TEMPORARY.items()}
        artifacts = [path for kind in below for path in self.root.glob(kind + below[kind])]
        swept = [path for path in artifacts if _idle_seconds(path) > old_seconds]
        for path in self._incoming.glob("*"):
            if _idle_seconds(path, *path.glob("*")) > UNFINISHED_SECONDS:
                swept.append(path)
        for path in swept:
            shutil.rmtree(path, ignore_errors=True)
        return len(swept)


def _bytes_in(folder: Path) -> int:
    total = 0
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += Path(directory, file).stat().st_size
    return total


def _idle_seconds(*paths: Path) -> float:
    """Seconds since the last change to one of them; 0 when one is gone."""
    try:
        return time.time() - max(path.stat().st_mtime for path in paths)
    except FileNotFoundError:
        return 0.0
