"""The artifact store: immutable directories, visible only when whole.

`manifest.json` in each has the SHA-256 of its files.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from fineserve.wire import ExportFormat
from learngenes.files import replaced, write_file
from registry.errors import ArtifactError, StorageFull
from registry.records import ModelRecord

PREVIEWS_FILE = "previews.png"
"""Samples of every size of a family, in the family's artifact."""
EXPORT_FILE = "model.tar"
MANIFEST = "manifest.json"
FULL = {errno.ENOSPC, errno.EDQUOT}
THERE = {errno.ENOTEMPTY, errno.EEXIST}
TEMPORARY = ("generations/*", "exports/*/*", "latents/*/*")
"""Artifacts that can be made again."""
READ_SECONDS = 60.0
"""Seconds after which an artifact has been read by whoever waited for it."""
UNFINISHED_SECONDS = 3600.0
"""Seconds without a write after which an artifact will never be finished."""


class ArtifactStore:
    def __init__(self, root: Path) -> None:
        self.root = root
        self.root.mkdir(parents=True, exist_ok=True)
        self._incoming = root / "incoming"

    def put(self, name: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
        """Store an artifact; one that is already there is whole and stays. Raises StorageFull."""
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
                    for file, content in {**files, MANIFEST: _manifest(files, description)}.items():
                        (new / file).write_bytes(content)
            except OSError as error:
                if error.errno not in THERE:  # else another worker was first
                    raise

    def replace_description(self, name: str, description: Mapping[str, Any]) -> None:
        """Store an artifact that has no files, or replace it. Raises StorageFull."""
        with self._room_for(name):
            write_file(self.root / name / MANIFEST, _manifest({}, description))

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        """A new folder on the disk of the artifacts, which is gone afterwards."""
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
        """Free bytes on the disk of the artifacts."""
        return shutil.disk_usage(self.root).free

    def used_bytes(self) -> dict[str, int]:
        """Bytes of all files, by kind of artifact; each file is looked at."""
        return {folder.name: _bytes_in(folder) for folder in self.root.iterdir() if folder.is_dir()}

    def read(self, name: str, file: str) -> bytes:
        """Content of a file, checked against its hash. Raises ArtifactError."""
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
        """Path of a file to stream; None when there is no such artifact."""
        path = self.root / name / file
        return path if path.exists() else None

    def checked_path(self, name: str, file: str) -> Path | None:
        """The same of a file that is what was stored; a corrupt artifact is deleted."""
        path = self.path(name, file)
        if path is None:
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
        """Manifest of an artifact. Raises ArtifactError."""
        try:
            return cast(dict[str, Any], json.loads((self.root / name / MANIFEST).read_bytes()))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"{name} cannot be read: {error}") from error

    def require_family(self, name: str, family: str, fingerprint: str) -> None:
        """Raise ArtifactError when a model's artifact was made for other learngenes."""
        if self.describe(name).get("family_fingerprint") != fingerprint:
            raise ArtifactError(
                f"{name} was made for another version of the family {family}; make another model"
            )

    def directories(self, kind: str) -> list[Path]:
        """Directories of a kind of artifact ("models", "tasks"), each named by an id."""
        folder = self.root / kind
        return sorted(folder.iterdir()) if folder.exists() else []

    def delete(self, name: str) -> None:
        shutil.rmtree(self.root / name, ignore_errors=True)

    def sweep(self, older_than_seconds: float) -> int:
        """Delete old artifacts that can be made again, and those never finished; their number.

        Nothing goes that is being written, or was published within READ_SECONDS.
        """
        old_seconds = max(older_than_seconds, READ_SECONDS)
        artifacts = [path for pattern in TEMPORARY for path in self.root.glob(pattern)]
        swept = [path for path in artifacts if _idle_seconds(path) > old_seconds]
        for path in self._incoming.glob("*"):
            if _idle_seconds(path, *path.glob("*")) > UNFINISHED_SECONDS:
                swept.append(path)
        for path in swept:
            shutil.rmtree(path, ignore_errors=True)
        return len(swept)


def served_name(model: ModelRecord) -> str:
    """Name of the artifact of the revision that is served."""
    return f"models/{model.id}/{model.artifact or f'revision-{model.revision}'}"


def export_name(model: ModelRecord, form: ExportFormat) -> str:
    """Name of the artifact of the revision that is served, in a format."""
    _, model_id, revision = served_name(model).split("/")
    return f"exports/{model_id}/{revision}-{form}"


def record_name(model_id: str) -> str:
    """Name of the artifact of a ready model's record, which outlives Redis."""
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


def _manifest(files: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    sha256 = {file: hashlib.sha256(content).hexdigest() for file, content in files.items()}
    return json.dumps({"sha256": sha256, **description}, indent=2).encode()


def _idle_seconds(*paths: Path) -> float:
    """Seconds since the last change to one of them; 0 when one is gone."""
    try:
        return time.time() - max(path.stat().st_mtime for path in paths)
    except FileNotFoundError:
        return 0.0
