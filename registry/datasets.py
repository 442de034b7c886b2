"""Tasks: data sets that models are retrained on. Each is one artifact, which says all about it."""

import contextlib
import re
from collections.abc import Iterator, Mapping
from datetime import datetime
from typing import ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from registry.errors import ArtifactError, RecordNotFound, StorageFull
from registry.records import now
from registry.store import ArtifactStore

TASKS = "tasks"
IMAGES_FILE = "images.safetensors"
"""images: uint8 (N, C, H, W); labels: int64 (N,), indices into the task's class_names."""
SHEET_FILE = "preview.png"
LATENTS_FILE = "latents.safetensors"
"""latents: float16 (N, C, H, W), of the task's images in their order."""
ID = re.compile(r"t-[0-9a-f]{16}")


class Task(BaseModel):
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


def task_name(task_id: str) -> str:
    return f"{TASKS}/{task_id}"


class Tasks:
    def __init__(self, store: ArtifactStore) -> None:
        self._store = store

    def put(self, task: Task, files: Mapping[str, bytes]) -> None:
        """Raises StorageFull."""
        self._store.put(task_name(task.id), files, {"task": task.model_dump(mode="json")})

    def get(self, task_id: str) -> Task:
        """Raises RecordNotFound."""
        if ID.fullmatch(task_id):  # it becomes part of a path
            try:
                described = self._store.describe(task_name(task_id))
                return Task.model_validate(described["task"])
            except (ArtifactError, KeyError, ValidationError):
                pass
        raise RecordNotFound(f"no task {task_id!r}")

    def of(self, owner: str | None) -> list[Task]:
        """Newest first; everybody's where `owner` is None."""
        tasks = [task for task in self._all() if owner in (None, task.owner)]
        return sorted(tasks, key=lambda task: task.created_at, reverse=True)

    def _all(self) -> Iterator[Task]:
        for directory in self._store.directories(TASKS):
            try:
                yield self.get(directory.name)
            except RecordNotFound:  # deleted meanwhile
                continue

    def read(self, task_id: str, file: str) -> bytes:
        """Raises ArtifactError."""
        return self._store.read(task_name(task_id), file)

    def latents(self, task_id: str, encoder: str) -> bytes | None:
        """What was kept of an encoder's, if it is still there and whole."""
        name = f"latents/{task_id}/{encoder}"
        with contextlib.suppress(ArtifactError):
            return self._store.read(name, LATENTS_FILE)
        self._store.delete(name)
        return None

    def keep_latents(self, task_id: str, encoder: str, content: bytes) -> None:
        """For other models of the task, while there is room for it, and as long as the task."""
        with contextlib.suppress(StorageFull, OSError):
            self._store.put(f"latents/{task_id}/{encoder}", {LATENTS_FILE: content}, {})
        if self._store.path(task_name(task_id), IMAGES_FILE) is None:
            self.delete(task_id)

    def delete(self, task_id: str) -> None:
        """Models that were made for it stay: what they have learned is theirs."""
        for name in (task_name(task_id), f"latents/{task_id}"):
            self._store.delete(name)
