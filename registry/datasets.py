"""Data sets that models are retrained on; the HTTP API calls them tasks, and so does the store.

Each is one artifact, which says all about it.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import ArtifactError, RecordNotFound, StorageFull
from registry.records import now
from registry.store import ArtifactStore

DATASETS = "tasks"
IMAGES_FILE = "images.safetensors"
"""images: uint8 (N, C, H, W); labels: int64 (N,), indices into the dataset's class_names."""
SHEET_FILE = "preview.png"
LATENTS_FILE = "latents.safetensors"
"""latents: float16 (N, C, H, W), of the dataset's images in their order."""
ID = re.compile(r"t-[0-9a-f]{16}")


class Dataset(BaseModel):
    model_config = ConfigDict(frozen=True)

    NAME: ClassVar[str] = "task"

    id: str
    owner: str = ""
    name: str
    family: str
    """Whose learngenes it is for: images have its size and channels."""
    class_names: list[str]
    counts: list[int]
    """Images of each class."""
    created_at: datetime = Field(default_factory=now)


def dataset_name(dataset_id: str) -> str:
    return f"{DATASETS}/{dataset_id}"


class Datasets:
    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def put(self, dataset: Dataset, files: Mapping[str, bytes]) -> None:
        """Raises StorageFull."""
        self._store.put(dataset_name(dataset.id), files, {"task": dataset.model_dump(mode="json")})

    def get(self, dataset_id: str) -> Dataset:
        """Raises RecordNotFound."""
        if ID.fullmatch(dataset_id):  # it becomes part of a path
            try:
                described = self._store.describe(dataset_name(dataset_id))
                return Dataset.model_validate(described["task"])
            except (ArtifactError, KeyError, ValidationError):
                pass
        raise RecordNotFound(f"no task {dataset_id!r}")

    def of(self, owner: str | None) -> list[Dataset]:
        """Newest first; everybody's where `owner` is None."""
        datasets = [dataset for dataset in self._all() if owner in (None, dataset.owner)]
        return sorted(datasets, key=lambda dataset: dataset.created_at, reverse=True)

    def _all(self) -> Iterator[Dataset]:
        for directory in self._store.directories(DATASETS):
            try:
                yield self.get(directory.name)
            except RecordNotFound:  # deleted meanwhile
                continue

    def read(self, dataset_id: str, file: str) -> bytes:
        """Raises ArtifactError."""
        return self._store.read(dataset_name(dataset_id), file)

    def latents(self, dataset_id: str, encoder: str) -> bytes | None:
        """What was kept of an encoder's, if it is still there and whole."""
        name = f"latents/{dataset_id}/{encoder}"
        with contextlib.suppress(ArtifactError):
            return self._store.read(name, LATENTS_FILE)
        self._store.delete(name)
        return None

    def keep_latents(self, dataset_id: str, encoder: str, content: bytes) -> None:
        """Kept for other models while there is room, and as long as the data set."""
        with contextlib.suppress(StorageFull, OSError):
            self._store.put(f"latents/{dataset_id}/{encoder}", {LATENTS_FILE: content}, {})
        if self._store.path(dataset_name(dataset_id), IMAGES_FILE) is None:
            self.delete(dataset_id)

    def delete(self, dataset_id: str) -> None:
        """Models that were made for it stay: what they have learned is theirs."""
        for name in (dataset_name(dataset_id), f"latents/{dataset_id}"):
            self._store.delete(name)
