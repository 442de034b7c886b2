"""Jobs of the sampling engine: requests, their parts, and their results."""

import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from opentelemetry.trace import Link

from learngenes.config import DType, Mode, Sampling
from learngenes.family.family import Family
from learngenes.model.factors import Own
from learngenes.stepping.batch import Part
from registry import tracing
from worker.sampling.elastic import Choice, Promise
from worker.sampling.residency import Entry, Pool

Pixels = NDArray[np.uint8]


class EngineStopped(Exception):
    """A request was cancelled, or the engine ended before its images were done."""


class NotFinite(Exception):
    """A model made images with values that are not finite."""


@dataclass(frozen=True)
class SampleRequest:
    family: Family
    model: str
    artifact: str
    """Artifact that is served of the model, by which its weights are kept on the device too."""
    depth: int
    rank: int
    mode: Mode
    dtype: DType
    load: Callable[[], Own]
    """Loader of the model's own parameters; the submitting thread calls it if need be."""
    class_labels: Sequence[int]
    seeds: Sequence[int]
    sampling: Sampling
    load_guide: Callable[[], Own] | None = None
    """Loader of the parameters of the smaller size that guides; None where none does."""
    owner: str = ""
    """Owner of the request; owners share a busy device evenly."""
    target_seconds: float | None = None
    """Seconds in which it should be done; by default a multiple of its time in a full batch."""

    @property
    def rows_per_image(self) -> int:
        """Most rows of an image in a step."""
        return 2 if self.sampling.guided else 1

    @property
    def rows(self) -> int:
        return len(self.seeds) * self.rows_per_image

    @property
    def model_key(self) -> Hashable:
        return self.model, self.artifact

    @property
    def guide_key(self) -> Hashable:
        """Key of the smaller size that guides, which all models of this mode share."""
        return self.family.fingerprint, self.sampling.guide, self.mode


def choice_of(request: SampleRequest, quality: float = 1.0) -> Choice:
    """What a request is served by, in the words of `elastic`."""
    sampling = request.sampling
    guide = sampling.guide if sampling.guided else None
    return Choice(
        quality,
        request.depth,
        sampling.num_inference_steps,
        sampling.guided,
        guide.depth if guide else 0,
    )


@dataclass(frozen=True)
class Elastic:
    """What a request may be served by, where the engine is to choose."""

    choices: Mapping[Choice, SampleRequest]
    deadline: float
    """Time by which its images should be there, by time.monotonic()."""
    yields: bool
    """Whether it is refused where they cannot be."""
    shrinks: bool
    """Whether it goes on by a smaller size where its promise would be broken."""

    @property
    def best(self) -> SampleRequest:
        return self.choices[max(self.choices, key=lambda choice: choice.quality)]


@dataclass(eq=False)
class Job:
    """Request that the engine has accepted."""

    request: SampleRequest
    """What is sampled: of an elastic request, by what the engine chose."""
    own: Own | None
    """Own parameters of the model; None when the engine had it already."""
    elastic: Elastic | None = None
    promise: Promise | None = None
    """What was promised of an elastic request."""
    shrunk: Choice | None = None
    """Size by which it went on, if that was the only way to keep the promise."""
    arrived_at: float = field(default_factory=time.monotonic)
    decided_at: float = 0.0
    """Time at which that was promised."""
    finished_at: float | None = None
    """Time at which its images were there, by time.monotonic()."""
    deadline: float = float("inf")
    """Deadline, by time.monotonic()."""
    parts: list["JobPart"] = field(default_factory=list)
    error: Exception | None = None
    link: Link = field(default_factory=tracing.here)
    """Link to the trace of whoever submitted it."""
    _images: dict[int, list[Pixels]] = field(default_factory=dict)
    _done: threading.Event = field(default_factory=threading.Event)

    @property
    def done(self) -> bool:
        return self._done.is_set()

    @property
    def progress(self) -> tuple[int, int]:
        """(Steps done, steps in all) over all batches that its images need."""
        steps, finished = self.request.sampling.num_inference_steps, len(self._images)
        done = finished * steps + sum(part.done_steps for part in self.parts)
        return done, max(1, finished + len(self.parts)) * steps

    def wait(self, seconds: float | None = None) -> bool:
        return self._done.wait(seconds)

    def images(self) -> list[Pixels]:
        """Pixels (C, H, W) of each image, once it is done. Raises what went wrong."""
        if self.error is not None:
            raise self.error
        return [image for start in sorted(self._images) for image in self._images[start]]

    def keep(self, part: "JobPart", images: list[Pixels]) -> None:
        self._images[part.images.start] = images
        self.parts.remove(part)
        if not self.parts:
            self.finished_at = time.monotonic()
            self._done.set()

    def fail(self, error: Exception) -> None:
        self.error = error
        self._done.set()


@dataclass(eq=False)
class JobPart:
    """Some images of a request, few enough for one batch; `turns` chooses among them."""

    job: Job
    images: slice
    pool: Pool
    state: Part | None = None
    """Its part of the batch, once it has begun."""
    modulations: list[Entry] = field(default_factory=list)
    """Keys of the modulations that it uses."""

    @property
    def owner(self) -> str:
        return self.job.request.owner

    @property
    def deadline(self) -> float:
        return self.job.deadline

    @property
    def rows(self) -> int:
        """Rows of the next step."""
        return self.rows_at(self.done_steps)

    def rows_at(self, step: int) -> int:
        return len(self.seeds) * (2 if step in self.job.request.sampling.guided else 1)

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
        return self.job.request.sampling.num_inference_steps - self.done_steps

    @property
    def steps_alike(self) -> int:
        """Number of steps until its rows are others."""
        return self.left if self.state is None else self.state.steps_alike


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
