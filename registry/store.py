"""The artifact store: immutable directories, visible only when whole.

An artifact is written under a temporary name, flushed to disk and renamed; `manifest.json`
holds the SHA-256 of its files.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from registry.errors import ArtifactError, StorageFull

PREVIEWS_FILE = "previews.png"
"""What every size of a family samples, by the family's artifact."""
MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EDQUOT}
TEMPORARY = ("generations", "exports", "latents")
"""Kinds of artifacts that can be made again."""


class ArtifactStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        self._incoming = root / "incoming"

    def put(self, name: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
        """Store an artifact; one that is already there is whole and stays.

        Raises StorageFull, and then leaves nothing behind.
        """
        target = self.root / name
        if target.exists():
            return
        temporary = self._incoming / uuid.uuid4().hex
        try:
            self._write(temporary, files, description)
            self._publish(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if error.errno in FULL:
                raise StorageFull(f"no room for {name} on the disk of {self.root}") from error
            raise

    def _publish(self, temporary: Path, target: Path) -> None:
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.rename(target)
        except OSError:
            if not target.exists():
                raise
            shutil.rmtree(temporary)  # another worker was first
        _flush_directory(target.parent)

    def _write(
        self, directory: Path, files: Mapping[str, bytes], description: Mapping[str, Any]
    ) -> None:
        directory.mkdir(parents=True)
        sha256 = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
        manifest = json.dumps({"sha256": sha256, **description}, indent=2).encode()
        for file, content in {**files, MANIFEST: manifest}.items():
            _write_durably(directory / file, content)

    def free_bytes(self) -> int:
        """On the disk of the artifacts."""
        return shutil.disk_usage(self.root).free

    def used_bytes(self) -> dict[str, int]:
        """By kind of artifact: what its files hold. It looks at each of them."""
        return {folder.name: _bytes_in(folder) for folder in self.root.iterdir() if folder.is_dir()}

    def read(self, name: str, file: str) -> bytes:
        """One file, checked against its hash. Raises ArtifactError."""
        directory = self.root / name
        try:
            content = (directory / file).read_bytes()
            expected = json.loads((directory / MANIFEST).read_bytes())["sha256"][file]
        except (OSError, KeyError, ValueError) as error:
            raise ArtifactError(f"{name}/{file} cannot be read: {error}") from error
        if hashlib.sha256(content).hexdigest() != expected:
            raise ArtifactError(f"{name}/{file} is corrupt: its SHA-256 is not the manifest's")
        return content

    def path(self, name: str, file: str) -> Path | None:
        """Of a file to stream; None when there is no such artifact."""
        path = self.root / name / file
        return path if path.exists() else None

    def describe(self, name: str) -> dict[str, Any]:
        """An artifact's manifest. Raises ArtifactError."""
        try:
            manifest: dict[str, Any] = json.loads((self.root / name / MANIFEST).read_bytes())
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{name} cannot be read: {error}") from error
        return manifest

    def require_family(self, name: str, family: str, fingerprint: str) -> None:
        """Raises ArtifactError when a model's artifact was made for other learngenes."""
        if self.describe(name).get("family_fingerprint") != fingerprint:
            raise ArtifactError(
                f"{name} was made for another version of the family {family}; make another model"
            )

    def directories(self, kind: str) -> list[Path]:
        """Of everything of a kind ("models", "tasks") that has an artifact, named by its id."""
        folder = self.root / kind
        return sorted(folder.iterdir()) if folder.exists() else []

    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def sweep(self, older_than_seconds: float) -> int:
        """Delete old artifacts that can be made again, and what was never finished.

        Gives their number.
        """
        horizon = time.time() - older_than_seconds
        swept = 0
        for folder in (*(self.root / kind for kind in TEMPORARY), self._incoming):
            with contextlib.suppress(FileNotFoundError):
                for entry in folder.iterdir():
                    if entry.stat().st_mtime < horizon:
                        shutil.rmtree(entry, ignore_errors=True)
                        swept += 1
        return swept


def revision_name(model_id: str, revision: int) -> str:
    return f"models/{model_id}/revision-{revision}"


def record_name(model_id: str) -> str:
    """Of a finished model's record; it outlives Redis."""
    return f"models/{model_id}/record"


def family_name(fingerprint: str) -> str:
    return f"families/{fingerprint}"


def generation_name(generation_id: str) -> str:
    return f"generations/{generation_id}"


def image_file(index: int) -> str:
    return f"{index:04d}.png"


def _bytes_in(folder: Path) -> int:
    total = 0
    for directory, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(FileNotFoundError):  # deleted meanwhile
                total += Path(directory, file).stat().st_size
    return total


def _write_durably(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _flush_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
