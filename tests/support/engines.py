"""An engine under a test's control, and what is asked of it."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any, Self

import numpy as np
import torch

from learngenes.config import SHARED_MODES, DType, Mode, Sampling, Size
from learngenes.family.family import Family
from learngenes.measuring.device import ComputeTimes
from learngenes.measuring.quiet import Quiet
from learngenes.measuring.steps import StepCosts
from learngenes.model.factors import Scales
from learngenes.model.sampling import sample
from learngenes.stepping.batch import Batch, Part
from learngenes.stepping.weights import kept
from tests.support.batches import other_scales
from worker.sampling.engine import Engine
from worker.sampling.jobs import Job, Pixels, SampleRequest
from worker.sampling.residency import Pool

FULL_ROWS = 12
SECONDS = 60.0
"""Nothing here takes so long; a test that waits for more has failed."""
AMPLE = 50_000_000


def made_up_costs(*_: object, **__: object) -> StepCosts:
    """W is always faster, so that a model's mode is the one that is asked for."""
    return StepCosts((1, 64), (0.001, 0.01), FULL_ROWS, 40_000, {48: 2.0})


def made_up_times(*_: object, **__: object) -> ComputeTimes:
    """Of a block that takes the same time whatever is in it."""
    rows = (1, 64)
    return ComputeTimes(rows, (0.001,) * 2, (0.001,) * 2, {8: (0.001,) * 2}, 0.001)


class Undisturbed(Quiet):
    """In place of a watch over this machine, on which other tests run."""

    def __init__(self, device: torch.device, by: str = "") -> None:
        self._by = by

    def disturbed_by(self) -> str:
        return self._by


Refusal = Callable[[Sequence[Part]], object]
"""Raises what composing these parts, or a step of them, is to fail with."""


class Gate:
    """Batches step when they are let: all at first."""

    def __init__(self) -> None:
        self.refuse_to_compose: Refusal = lambda _: None
        self.refuse_to_step: Refusal = lambda _: None
        self._changed = threading.Condition()
        self._allowed = inf
        self._waiting = False
        self.sizes: list[int] = []
        """Images of each batch that stepped."""

    def close(self) -> None:
        self._allowed = 0

    def allow(self, steps: float) -> None:
        """So many more; returns when they have been done and the next one waits."""
        with self._changed:
            self._allowed += steps
            self._waiting = False
            self._changed.notify_all()
        self.reached()

    def open(self) -> None:
        with self._changed:
            self._allowed = inf
            self._changed.notify_all()

    def reached(self) -> None:
        """Wait for a step that is not allowed yet."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._waiting, SECONDS)

    def compose(self, parts: Sequence[Part], *rest: Any) -> Batch:
        """In place of `Batch`."""
        self.refuse_to_compose(parts)
        return GatedBatch(self, parts, *rest)

    def enter(self, batch: Batch) -> None:
        with self._changed:
            self._waiting = self._allowed < 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed >= 1, SECONDS)
            self._allowed -= 1
            self.sizes.append(sum(len(part.x) for part in batch.parts))


class GatedBatch(Batch):
    def __init__(self, gate: Gate, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._gate = gate

    def step(self) -> None:
        self._gate.refuse_to_step(self.parts)
        self._gate.enter(self)
        super().step()


def wait_until(true: Callable[[], bool]) -> None:
    ends = time.monotonic() + SECONDS
    while not true():
        assert time.monotonic() < ends
        time.sleep(0.001)


def room_for(engine: Engine, extra: int) -> None:
    """So many bytes more than it has now, which is what an idle engine needs."""
    engine.residency.budget_bytes = engine.residency.nbytes + extra


@dataclass(frozen=True)
class Model:
    seed: int = 0
    depth: int = 2
    rank: int = 24
    mode: Mode = Mode.MATERIALISED
    dtype: DType = DType.FLOAT32

    def scales(self, family: Family) -> Scales:
        return other_scales(family, Size(depth=self.depth, rank=self.rank), self.seed)


def ask(
    family: Family, model: Model | None = None, images: int = 2, **changes: Any
) -> SampleRequest:
    model = model or Model()
    fields: dict[str, Any] = {
        "family": family,
        "model": str(model),
        "artifact": "revision-0",
        "depth": model.depth,
        "rank": model.rank,
        "mode": model.mode,
        "dtype": model.dtype,
        "load": lambda: model.scales(family),
        "class_labels": [i % 5 for i in range(images)],
        "seeds": list(range(images)),
        "target_seconds": inf,
    }
    asked = {name: changes.pop(name) for name in {*Sampling.model_fields} & changes.keys()}
    sampling = Sampling().model_copy(update={"num_inference_steps": 3, **asked})
    if sampling.guide is not None:
        size, mode, dtype = sampling.guide, model.mode, model.dtype
        changes["load_guide"] = lambda: kept(family.own_of(size, mode, dtype), family, mode, dtype)
    return SampleRequest(**{**fields, **changes}, sampling=sampling)


class GatedEngine(Engine):
    """An engine of one family, on made up costs; its batches step when its gate lets them."""

    def __init__(self, family: Family, **changes: Any) -> None:
        self.family, self.gate = family, Gate()
        options = {
            "measure_steps": made_up_costs,
            "measure_times": made_up_times,
            "quiet": Undisturbed,
            "compose": self.gate.compose,
            **changes,
        }
        super().__init__([family], AMPLE, **options)

    def __enter__(self) -> Self:
        for dtype in (DType.FLOAT32, DType.BFLOAT16):  # else a test's first model brings them
            self.residency.pool(self.family, dtype, 24)
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.open()
        self.stop()

    @property
    def pool(self) -> Pool:
        """Pool of the models in float32."""
        return self.residency.pool(self.family, DType.FLOAT32, 24)

    def ask(self, model: Model | None = None, images: int = 2, **changes: Any) -> SampleRequest:
        return ask(self.family, model, images, **changes)

    def begin(self, model: Model | None = None, images: int = 2, **changes: Any) -> Job:
        return self.submit(self.ask(model, images, **changes))

    def hold(self, first: SampleRequest, *others: SampleRequest) -> list[Job]:
        """Jobs of requests of which the others come when the first waits at the closed gate."""
        self.gate.close()
        jobs = [self.submit(first)]
        self.gate.reached()
        return [*jobs, *map(self.submit, others)]


def images_of(job: Job) -> list[Pixels]:
    assert job.wait(SECONDS)
    return job.images()


def alone(engine: Engine, request: SampleRequest) -> list[Pixels]:
    """Of a request when the engine has nothing else to do."""
    return images_of(engine.submit(request))


def same(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def undisturbed(engine: GatedEngine, *jobs: Job) -> bool:
    """Whether jobs that are let go get the images that their requests get alone."""
    engine.gate.open()
    images = [images_of(job) for job in jobs]
    return all(
        same(ours, alone(engine, job.request)) for job, ours in zip(jobs, images, strict=True)
    )


def reference(family: Family, model: Model, request: SampleRequest) -> np.ndarray:
    """By the model's own network, its guide's, and diffusers' scheduler."""
    guide = None
    if request.load_guide is not None:
        guide = family.assemble(request.load_guide(), model.mode, model.dtype)
    images = sample(
        family.assemble(model.scales(family), model.mode, model.dtype),
        family.manifest.diffusion,
        request.class_labels,
        request.seeds,
        **{**dict(request.sampling), "guide": guide},
    )
    return images.numpy().astype(int)


# Images


def random_model(generator: random.Random) -> Model:
    dtype = generator.choice(list(DType))
    mode = Mode.FACTORED if dtype is DType.INT3 else generator.choice(SHARED_MODES)
    rank = generator.randint(2, 48)
    return Model(generator.randrange(10), generator.choice((2, 3, 4)), rank, mode, dtype)
