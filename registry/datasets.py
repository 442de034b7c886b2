"""Data sets that models are retrained on, which the HTTP API and the store call tasks.

Each data set is one artifact, whose manifest describes it.
"""

import contextlib
import re
from collections.abc import Mapping
from datetime import datetime
from typing import ClassVar

from pydantic import ConfigDict, Field, ValidationError

from fineserve.wire import TaskResponse
from registry.errors import ArtifactError, RecordNotFound, StorageFull, StoreAway
from registry.records import now
from registry.store import ArtifactStore

DATASETS = "tasks"
IMAGES_FILE = "images.safetensors"
"""images: uint8 (N, C, H, W); labels: int64 (N,), indices into the data set's class_names."""
SHEET_FILE = "preview.png"
LATENTS_FILE = "latents.safetensors"
"""latents: float16 (N, C, H, W), of the data set's images in their order."""
ID = re.compile(r"t-[0-9a-f]{16}")


class Dataset(TaskResponse):
    """A data set for the learngenes of one family, whose image size and channels it has."""

    model_config = ConfigDict(frozen=True)

    NAME: ClassVar[str] = "task"

    owner: str = ""
    created_at: datetime = Field(default_factory=now)


def dataset_name(dataset_id: str) -> str:
    return f"{DATASETS}/{dataset_id}"


class Datasets:
    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def put(self, dataset: Dataset, files: Mapping[str, bytes]) -> None:
        """Store a data set. Raises StorageFull."""
        self._store.put(dataset_name(dataset.id), files, {"task": dataset.model_dump(mode="json")})

    def get(self, dataset_id: str) -> Dataset:
        """Data set of an id. Raises RecordNotFound."""
        if ID.fullmatch(dataset_id):  # it becomes part of a path
            with contextlib.suppress(ArtifactError, KeyError, ValidationError):
                described = self._store.describe(dataset_name(dataset_id))
                return Dataset.model_validate(described["task"])
        raise RecordNotFound(f"no task {dataset_id!r}")

    def of(self, owner: str | None) -> list[Dataset]:
        """Data sets of an owner, or all where `owner` is None, newest first."""
        datasets = []
        for dataset_id in self._store.ids(DATASETS):
            with contextlib.suppress(RecordNotFound):  # deleted meanwhile
                datasets.append(self.get(dataset_id))
        seen = [dataset for dataset in datasets if owner in (None, dataset.owner)]
        return sorted(seen, key=lambda dataset: dataset.created_at, reverse=True)

    def read(self, dataset_id: str, file: str) -> bytes:
        """Content of a file. Raises ArtifactError."""
        return self._store.read(dataset_name(dataset_id), file)

    def latents(self, dataset_id: str, encoder: str) -> bytes | None:
        """Latents that an encoder made of the images; None where they are gone or corrupt."""
        name = f"latents/{dataset_id}/{encoder}"
        with contextlib.suppress(ArtifactError):
            return self._store.read(name, LATENTS_FILE)
        if self._store.has(name):  # else another worker may be putting them
            self._store.delete(name)
        return None

    def keep_latents(self, dataset_id: str, encoder: str, content: bytes) -> None:
        """Keep latents for other models while there is room, and as long as the data set."""
        with contextlib.suppress(StorageFull, StoreAway, OSError):
            self._store.put(f"latents/{dataset_id}/{encoder}", {LATENTS_FILE: content}, {})
        if not self._store.has(dataset_name(dataset_id), IMAGES_FILE):
            self.delete(dataset_id)

    def delete(self, dataset_id: str) -> None:
        """Delete a data set; models that were retrained on it stay as they are."""
        for name in (dataset_name(dataset_id), f"latents/{dataset_id}"):
            self._store.delete(name)
