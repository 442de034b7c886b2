"""What the sampling engine is asked for, and what becomes of it."""

import threading
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Link

from learngenes.config import DType, Mode, Scheduler
from learngenes.family.family import Family
from learngenes.model.factors import Own
from learngenes.stepping.batch import Part
from registry import tracing
from worker.sampling.residency import Entry, Pool

Pixels = NDArray[np.uint8]


class EngineStopped(Exception):
    """A request was cancelled, or the engine ended before its images were done."""


class NotFinite(Exception):
    """A model made images that are not numbers."""


@dataclass(frozen=True)
class SampleRequest:
    family: Family
    model: str
    artifact: str
    """What is served of the model is kept by this name, on the device too."""
    rank: int
    mode: Mode
    dtype: DType
    load: Callable[[], Own]
    """The model's own parameters; called by the thread that submits, when they are not there."""
    class_labels: Sequence[int]
    seeds: Sequence[int]
    num_inference_steps: int
    guidance_scale: float = 2.0
    scheduler: Scheduler = Scheduler.DDIM
    owner: str = ""
    """Owners have the same share of a device that has too much to do."""
    target_seconds: float | None = None
    """In which it should be done; by default a multiple of what it takes in a full batch."""

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1

    @property
    def rows_per_image(self) -> int:
        return 2 if self.guided else 1

    @property
    def rows(self) -> int:
        return len(self.seeds) * self.rows_per_image

    @property
    def model_key(self) -> Hashable:
        return self.model, self.artifact


@dataclass(eq=False)
class Job:
    """A request that the engine has."""

    request: SampleRequest
    own: Own | None
    """None when the engine had the model already."""
    arrived_at: float = field(default_factory=time.monotonic)
    deadline: float = float("inf")
    """Of time.monotonic()."""
    parts: list["JobPart"] = field(default_factory=list)
    error: Exception | None = None
    link: Link = field(default_factory=tracing.here)
    """To the trace of whoever submitted it."""
    _images: dict[int, list[Pixels]] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def progress(self) -> tuple[int, int]:
        """(steps done, steps in all), of all batches that its images need."""
        steps, finished = self.request.num_inference_steps, len(self._images)
        done = finished * steps + sum(part.done_steps for part in self.parts)
        return done, max(1, finished + len(self.parts)) * steps

    def wait(self, seconds: float | None = None) -> bool:
        return self._done.wait(seconds)

    def images(self) -> list[Pixels]:
        """(C, H, W) of each, once it is done. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        return [image for start in sorted(self._images) for image in self._images[start]]

    def keep(self, part: "JobPart", images: list[Pixels]) -> None:
        self._images[part.images.start] = images
        self.parts.remove(part)
        if not self.parts:
            self._done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._done.set()


@dataclass(eq=False)
class JobPart:
    """Some of a request's images, few enough for one batch; what `turns` chooses from."""

    job: Job
    images: slice
    pool: Pool
    state: Part | None = None
    """Once it has begun."""
    modulations: list[Entry] = field(default_factory=list)
    """Keys of those that it uses."""

    @property
    def owner(self) -> str:
        return self.job.request.owner

    @property
    def deadline(self) -> float:
        return self.job.deadline

    @property
    def rows(self) -> int:
        return len(self.seeds) * self.job.request.rows_per_image

    @property
    def seeds(self) -> Sequence[int]:
        return self.job.request.seeds[self.images]

    @property
    def place(self) -> Pool:
        return self.pool

    @property
    def done_steps(self) -> int:
        return self.state.done_steps if self.state is not None else 0

    @property
    def left(self) -> int:
        return self.job.request.num_inference_steps - self.done_steps


@dataclass(eq=False)
class Preview:
    job: Job
    pixels: Pixels | None = None
    done: threading.Event = field(default_factory=threading.Event)

    def answer(self) -> None:
        state = self.job.parts[0].state if self.job.parts else None
        if state is not None and state.done_steps:
            predicted = state.batch.predicted(state) if state.batch else state.previous
            stem = self.job.request.family.stem
            self.pixels = stem.pixels(predicted[:1])[0].numpy()
        self.done.set()
