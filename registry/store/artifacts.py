"""What an artifact store is: immutable sets of files, visible only when whole.

The manifest of each has the SHA-256 of its files.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fineserve.wire import ExportFormat
from registry.errors import ArtifactError
from registry.records import ModelRecord

PREVIEWS_FILE = "previews.png"
"""Samples of every size of a family, in the family's artifact."""
EXPORT_FILE = "model.tar"
MANIFEST = "manifest.json"
KINDS = ("models", "tasks", "families", "published", "generations", "exports", "latents")
TEMPORARY = {"generations": 2, "exports": 3, "latents": 3}
"""Kinds of artifacts that can be made again, and of how many parts their names are."""
READ_SECONDS = 60.0
"""Seconds after which an artifact has been read by whoever waited for it."""
LINK_SECONDS = 300
"""Seconds in which a download from the bucket has to begin."""
UNFINISHED_SECONDS = 3600.0
"""Seconds without a write after which an artifact will never be finished."""


class ArtifactStore(ABC):
    """Artifacts by name, a path whose first part is their kind.

    Every method raises StoreAway where the store cannot be reached.
    """

    @abstractmethod
    def put(self, name: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
        """Store an artifact; one that is already there is whole and stays. Raises StorageFull."""

    @abstractmethod
    def replace_description(self, name: str, description: Mapping[str, Any]) -> None:
        """Store an artifact that has no files, or replace it. Raises StorageFull."""

    @abstractmethod
    def describe(self, name: str) -> dict[str, Any]:
        """Manifest of an artifact. Raises ArtifactError."""

    @abstractmethod
    def read_all(self, name: str, files: Sequence[str]) -> list[bytes]:
        """Contents of files, checked against their hashes. Raises ArtifactError."""

    def read(self, name: str, file: str) -> bytes:
        """Content of one file, checked likewise."""
        (content,) = self.read_all(name, [file])
        return content

    @abstractmethod
    def checked_path(self, name: str, file: str) -> Path | None:
        """Path of a file to stream, which is what was stored; a corrupt artifact is deleted.

        None where there is no such artifact.
        """

    def link(self, name: str, file: str) -> str | None:  # noqa: ARG002  # a directory has none
        """Address from which anybody can fetch the one file of an artifact for LINK_SECONDS.

        None where the store gives no such addresses, or has no such artifact.
        """
        return None

    @abstractmethod
    def has(self, name: str, file: str = MANIFEST) -> bool:
        """Whether an artifact has a file, or is there at all."""

    @abstractmethod
    def ids(self, kind: str) -> list[str]:
        """Second parts of the names of a kind of artifact ("models", "tasks")."""

    @abstractmethod
    def idle_seconds(self, name: str) -> float:
        """Seconds since the last write to an artifact, or to what is below its name."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Delete an artifact, and all that is below its name."""

    @abstractmethod
    def sweep(self, older_than_seconds: float) -> int:
        """Delete old artifacts that can be made again, and those never finished; their number.

        Nothing goes that is being written, or was published within READ_SECONDS.
        """

    @abstractmethod
    def scratch(self) -> AbstractContextManager[Path]:
        """A new folder on a disk of this host, which is gone afterwards."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Free bytes on the disk of this host that holds artifacts, or what was read of them."""

    @abstractmethod
    def used_bytes(self) -> dict[str, int]:
        """Bytes of all files, by kind of artifact; each file is looked at."""

    @abstractmethod
    def checkpoint(self, name: str) -> Path:
        """Path on this host of a file that work goes on from, as it was kept last."""

    @abstractmethod
    def keep_checkpoint(self, name: str) -> None:
        """Keep what is in that file now, so that another host can go on from it."""

    @abstractmethod
    def drop_checkpoints(self, name: str) -> None:
        """Delete all checkpoints below a name, and that itself where nothing else is there."""

    def require_family(self, name: str, family: str, fingerprint: str) -> None:
        """Raise ArtifactError when a model's artifact was made for other learngenes."""
        if self.describe(name).get("family_fingerprint") != fingerprint:
            raise ArtifactError(
                f"{name} was made for another version of the family {family}; make another model"
            )


def manifest_of(files: Mapping[str, bytes], description: Mapping[str, Any]) -> bytes:
    sha256 = {file: sha256_of(content) for file, content in files.items()}
    return json.dumps({"sha256": sha256, **description}, indent=2).encode()


def sha256_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def require_whole(name: str, file: str, content: bytes, sha256: str) -> bytes:
    """The content. Raises ArtifactError where its hash is another."""
    if sha256_of(content) != sha256:
        raise ArtifactError(f"{name}/{file} is corrupt: its SHA-256 is not the manifest's")
    return content


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
