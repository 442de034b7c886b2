"""The sampling engine: one loop that owns a device and steps every running request together.

Requests come and go between two denoising steps. They may differ in model, size, class, number
of steps, scheduler, guidance and seed; those of one family and dtype are one batch
(`learngenes.stepping.batch`). All tensor work is done by the engine's own thread and the lanes
that it waits for (`learngenes.stepping.lanes`), in which rows share every matrix product.
"""

import contextlib
import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import structlog
import torch
from torch import Tensor

from learngenes.config import DType, Mode
from learngenes.device import (
    compute_dtype,
    decoded_together,
    release_memory,
    require_usable,
    synchronise,
    with_threads,
)
from learngenes.family.family import Family
from learngenes.measuring.device import ComputeTimes, measure_times
from learngenes.measuring.quiet import Quiet
from learngenes.measuring.steps import (
    StepCosts,
    measure_step_costs,
    median_of,
    seconds_a_step,
)
from learngenes.model.dit import Stem
from learngenes.model.factors import Own
from learngenes.model.sampling import initial_noise
from learngenes.sizing.cost import decoder_bytes, decoding_bytes
from learngenes.stepping.batch import Batch, Part, Stack, Tables
from learngenes.stepping.kernels import Kernels
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.schedules import schedule
from learngenes.stepping.weights import ModelWeights, SharedWeights
from registry import metrics, tracing
from registry.errors import Refused
from worker.leases import Watch
from worker.sampling.elastic import Choice
from worker.sampling.jobs import (
    Elastic,
    EngineStopped,
    Job,
    JobPart,
    NotFinite,
    Pixels,
    Preview,
    SampleRequest,
)
from worker.sampling.kept_steps import KeptSteps
from worker.sampling.promises import Expected, Promises
from worker.sampling.residency import OutOfRoom, Pool, Residency
from worker.sampling.turns import BatchLimits, choose

log = structlog.get_logger()

QUANTUM_STEPS = 8
"""Steps after which it is decided again who runs, when there are more than fit."""
WATCHED_STEPS = 4
"""The same while a promise could be broken."""
FIRST_SECONDS = 0.5
"""Seconds, about, in which the steps of a family are measured when somebody waits for them."""
IDLE_SECONDS = 2.0
"""Seconds without a request after which they are measured as they should be."""
AGAIN_SECONDS = 30.0
"""Seconds until what was measured beside something else is measured again; each time twice as long,
MOST_AGAIN times: on a machine that others use, measuring would otherwise take half of a processor
for ever."""
MOST_AGAIN = 7
MEASUREMENTS = 3
"""Times that steps are measured, APART_SECONDS apart, and the median kept: a machine that others
have a share of is slower for half a minute now and then."""
APART_SECONDS = 60.0

Key = tuple[str, torch.dtype]
"""A family's fingerprint, and what it computes in."""


class Wanted(Exception):
    """Somebody came, or wants the device alone, while the engine was measuring, which can wait."""


@dataclass
class Unmeasured:
    """Steps of a family that were measured in a hurry, by other kernels, too seldom, or never."""

    family: Family
    dtype: DType
    due: float = 0.0
    """Time, by time.monotonic(), before which they are not measured."""
    taken: list[tuple[StepCosts, ComputeTimes]] = field(default_factory=list)


class Engine:
    """Engine of one device: `start` it, `submit` from any thread, `stop` it."""

    def __init__(
        self,
        families: Iterable[Family],
        budget_bytes: int,
        *,
        max_rows: int = 64,
        latency_target_ratio: float = 2.0,
        measure_steps: Callable[..., StepCosts] = measure_step_costs,
        measure_times: Callable[..., ComputeTimes] = measure_times,
        profile_seconds: float = 10.0,
        idle_release_seconds: float = math.inf,
        kept: KeptSteps | None = None,
        quiet: Callable[[torch.device], Quiet] = Quiet,
        alone: Callable[[], AbstractContextManager[bool]] = lambda: contextlib.nullcontext(True),
        others_wait: Callable[[], bool] = lambda: False,
        compose: Callable[[Sequence[Part], Tables, Stack, Kernels], Batch] = Batch,
    ) -> None:
        """`measure_steps` and `measure_times` measure the steps of a family in one dtype, up to a
        number of rows, the latter for about `profile_seconds`.

        They do when the device is idle, if `alone` says that nobody else measures or compiles,
        until `others_wait` for that, and again later when it was not `quiet`. Weights that nobody
        has asked for in `idle_release_seconds` leave the device.
        """
        self._families = {family.fingerprint: family for family in families}
        self._device = next(iter(self._families.values())).stem.positions.device
        self._max_rows = max_rows
        self._measure_steps, self._measure_times = measure_steps, measure_times
        self._profile_seconds, self._compose_batch = profile_seconds, compose
        self._kept, self._alone, self._quiet = kept, alone, quiet
        self._others_wait = others_wait
        self._idle_release_seconds = idle_release_seconds
        self.lanes = Lanes.of(self._device)
        self._kernels: dict[Key, Kernels] = {}
        """Compiled kernels, by what uses them."""
        self._arrived_kernels: dict[Key, Kernels] = {}
        self._budget_bytes = budget_bytes
        self.residency = Residency(budget_bytes - self._decoders_bytes())
        self._latency_target_ratio = latency_target_ratio
        self.costs: dict[Key, StepCosts] = {}
        """Step costs of everything that was asked for."""
        self._unmeasured: dict[Key, Unmeasured] = {}
        self._disturbed = 0
        """Measurements beside something else since the last one alone."""
        self._asked: list[tuple[Family, DType]] = []
        self.gauges: dict[str, float] = {}
        """Values of registry.metrics.WORKER_GAUGES at the last composition."""
        self._parts: list[JobPart] = []
        self._running: list[JobPart] = []
        self._batches: list[Batch] = []
        self._served: dict[str, float] = {}
        """Rows stepped for each owner that has something here."""
        self._expected: dict[Batch, Expected] = {}
        """What a step of each batch is expected to take."""
        self._promises = Promises(self._pool, self._costs_of, self._is_estimated)
        self._changed = threading.Condition()
        self._arrived: list[Job] = []
        self._cancelled: list[Job] = []
        self._previews: list[Preview] = []
        self._stopping = False
        self.watch = Watch()
        """Watch over steps, while there are any to do."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def _decoders_bytes(self) -> int:
        """Bytes of the decoders of families of latents, which Residency does not count."""
        networks = [family.manifest.network for family in self._families.values()]
        held = sum(decoder_bytes(network) for network in networks)
        together = decoded_together(self._device)
        decoding = max(decoding_bytes(network, self._max_rows, together) for network in networks)
        return held + self.lanes.count * decoding

    def start(self) -> None:
        self._thread.start()

    def add(self, families: Iterable[Family]) -> None:
        """Serve these families, too."""
        self._families |= {family.fingerprint: family for family in families}
        self.residency.budget_bytes = self._budget_bytes - self._decoders_bytes()

    def stop(self) -> None:
        """End the engine; requests under way get EngineStopped."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread.ident is not None:
            self._thread.join()

    def submit(self, request: SampleRequest) -> Job:
        """Hand in a request. Raises what `request.load` raises, and EngineStopped."""
        known = self.residency.knows(request.model_key)
        return self._accept(Job(request, None if known else request.load()))

    def submit_elastic(self, elastic: Elastic) -> Job:
        """Hand in a request of which the engine chooses the size; it may end as Refused."""
        best = elastic.best
        known = self.residency.knows(best.model_key)
        return self._accept(Job(best, None if known else best.load(), elastic))

    def _accept(self, job: Job) -> Job:
        with self._changed:
            if self._stopping:
                raise EngineStopped("the engine is not running")
            self._arrived.append(job)
            self._changed.notify()
        return job

    def delivered(self, job: Job) -> None:
        """Note that the images of a job are stored."""
        if job.promise is not None and job.finished_at is not None:
            self._promises.controller.learned.delivered(time.monotonic() - job.finished_at)

    def cancel(self, job: Job) -> None:
        """End a job with EngineStopped; its rows leave the batch before the next step."""
        with self._changed:
            self._cancelled.append(job)
            self._changed.notify()

    def use(self, family: Family, compute: torch.dtype, kernels: Kernels) -> None:
        """Step a family by these kernels from the next step on."""
        with self._changed:
            self._arrived_kernels[family.fingerprint, compute] = kernels
            self._changed.notify()

    def measure(self, family: Family, dtype: DType) -> None:
        """Measure a family's steps once nobody asks for anything, unless that is known."""
        with self._changed:
            self._asked.append((family, dtype))
            self._changed.notify()

    def is_measured(self, fingerprint: str, compute: torch.dtype) -> bool:
        """Whether a family has been measured in one dtype of computing, as its steps are now."""
        key = fingerprint, compute
        left = self._unmeasured.get(key)
        known = left is None or bool(left.taken)
        return known and not self._asked and key not in self._arrived_kernels

    def preview(self, job: Job, max_seconds: float = 1.0) -> Pixels | None:
        """First image (C, H, W) as the last step predicted it; None before the first step."""
        preview = Preview(job)
        with self._changed:
            self._previews.append(preview)
            self._changed.notify()
        preview.done.wait(max_seconds)
        return preview.pixels

    # From here on all is done by the engine's own thread and its lanes.

    def _run(self) -> None:
        try:
            with with_threads(self.lanes.threads), torch.inference_mode():
                while self._turn():
                    pass
        except Exception:
            log.exception("the engine broke")
        finally:
            with self._changed:
                self._stopping = True
            ended = EngineStopped("the engine stopped")
            for job in {*self._arrived, *(part.job for part in self._parts)}:
                job.fail(ended)
            self.lanes.close()

    def _turn(self) -> bool:
        """Let requests come and go, then step until one does; False at the end."""
        with self._changed:
            idle = False
            while not (self._wanted or self._parts or idle):
                self.watch.rest()
                self.gauges = self._gauges()
                idle = not self._changed.wait(self._idle_seconds())
            self.watch.moved()
            began = time.perf_counter()
            if self._stopping:
                return False
            arrived, self._arrived = self._arrived, []
            cancelled, self._cancelled = self._cancelled, []
            previews, self._previews = self._previews, []
            kernels, self._arrived_kernels = self._arrived_kernels, {}
            asked, self._asked = self._asked, []
        if idle:
            self._release_unused()
            self._measure_due()
        if kernels:
            self._exchange(kernels)
        for family, dtype in asked:  # by the kernels that have just come
            self._note_unmeasured(family, dtype)
        for job in arrived:
            with self._failing(job):
                self._take_in(job)
        for job in cancelled:
            self._end(job, EngineStopped("cancelled"))
        for preview in previews:
            with contextlib.suppress(Exception):  # nobody depends on one
                preview.answer()
        steps = self._compose()
        self.gauges = self._gauges()
        composed = time.perf_counter()
        for _ in range(steps):
            if not all(self._step(batch) for batch in self._batches) or self._wanted:
                break
        stepped = time.perf_counter()
        self._collect()
        if steps:
            self._promises.turned(time.perf_counter() - began, stepped - composed)
        return True

    def _gauges(self) -> dict[str, float]:
        return {
            "device_held_bytes": self.residency.nbytes,
            "device_budget_bytes": self.residency.budget_bytes,
            "engine_models": self.residency.models,
            "engine_running": len(self._running),
            "engine_waiting": len(self._parts) - len(self._running),
        }

    @property
    def elastic_gauges(self) -> dict[str, float]:
        """The same of elastic requests, as they are now. Any thread may ask."""
        return self._promises.gauges()

    @property
    def _wanted(self) -> bool:
        arrived = self._arrived or self._arrived_kernels or self._asked
        return bool(arrived or self._cancelled or self._previews or self._stopping)

    def _idle_seconds(self) -> float | None:
        """Seconds without a request after which there is something to do; None for never."""
        now, due = time.monotonic(), []
        due += [max(IDLE_SECONDS, each.due - now) for each in self._unmeasured.values()]
        used = [pool.used_at for pool in self.residency.pools]
        if used and self._idle_release_seconds < math.inf:
            due.append(max(0.0, min(used) + self._idle_release_seconds - now))
        return min(due, default=None)

    def _release_unused(self) -> None:
        """Free what the weights take that nobody has asked for lately; a request makes it again."""
        dropped = self.residency.release(time.monotonic() - self._idle_release_seconds)
        if dropped:
            names = sorted({pool.shared.family.manifest.name for pool in dropped})
            nbytes = sum(pool.nbytes for pool in dropped)
            dropped.clear()
            release_memory(self._device)
            log.info("idle weights released", families=names, bytes=nbytes)

    def _exchange(self, kernels: dict[Key, Kernels]) -> None:
        """Go on by other kernels, whose steps are measured when there is time."""
        self._dissolve()
        self._kernels |= kernels
        for key in kernels:  # what was taken is of others
            self._unmeasured.pop(key, None)
        for pool in self.residency.pools:
            if (key := _key(pool.shared)) in kernels and key in self.costs:
                before = self.costs.pop(key)
                try:
                    self._costs(pool.shared)
                except Exception:  # what runs must not end with it
                    log.exception("steps of other kernels cannot be measured")
                    self.costs[key] = before

    def _kernels_of(self, key: Key) -> Kernels:
        return self._kernels.get(key) or Kernels(lanes=self.lanes)

    def _costs(self, shared: SharedWeights) -> StepCosts:
        """Step costs as they are kept, or else measured in a hurry at first."""
        key = _key(shared)
        kernels = self._kernels_of(key)
        if key not in self.costs:
            costs = self._note_unmeasured(shared.family, shared.dtype)
            if costs is None:
                costs = self._measure_steps(shared, kernels, self._max_rows, FIRST_SECONDS)
            self.costs[key] = costs
        return self.costs[key]

    def _note_unmeasured(self, family: Family, dtype: DType) -> StepCosts | None:
        """Step costs that are kept; what is not known of these kernels is to be measured."""
        key = family.fingerprint, compute_dtype(dtype, self._device)
        kernels, kept = self._kernels_of(key), None
        if self._kept is not None:
            kept = self._kept.get(family, key[1], kernels, self._max_rows)
        costs, exact = kept or (None, False)
        if not exact:
            self._unmeasured.setdefault(key, Unmeasured(family, dtype))
        elif (begun := self._unmeasured.get(key)) and not begun.taken:
            del self._unmeasured[key]
        return costs

    def _measure_due(self) -> None:
        now = time.monotonic()
        due = next((key for key, each in self._unmeasured.items() if each.due <= now), None)
        if due is not None:
            self._measure(due, self._unmeasured[due])

    def _measure(self, key: Key, unmeasured: Unmeasured) -> None:
        """Measure steps that were not measured as they should be, unless somebody comes."""
        family, dtype = unmeasured.family, unmeasured.dtype
        held = [pool.shared for pool in self.residency.pools if _key(pool.shared) == key]
        started = time.monotonic()
        try:
            with self._alone() as alone:
                if not alone:
                    return
                shared = held[0] if held else SharedWeights(family, dtype)
                kernels, how = self._kernels_of(key), {"seconds_of": self._seconds_a_step}
                quiet = self._quiet(self._device)
                costs = self._measure_steps(shared, kernels, self._max_rows, **how)
                times = self._measure_times(
                    shared, kernels, self._max_rows, self._profile_seconds, **how
                )
                disturbed = quiet.disturbed_by()
        except Wanted:
            return
        except Exception:
            log.exception("steps cannot be measured; what was measured in a hurry stays")
            del self._unmeasured[key]
            return
        if disturbed:  # whatever is measured next would be, too
            for each in self._unmeasured.values():
                each.due = max(each.due, time.monotonic() + AGAIN_SECONDS * 2**self._disturbed)
            self._disturbed = min(self._disturbed + 1, MOST_AGAIN)
            log.warning("measured beside others, and again later", reason=disturbed)
            return
        self._disturbed = 0
        unmeasured.taken.append((costs, times))
        unmeasured.due = time.monotonic() + APART_SECONDS
        if len(unmeasured.taken) == MEASUREMENTS:
            del self._unmeasured[key]
        costs = median_of([costs for costs, _ in unmeasured.taken])
        times = median_of([times for _, times in unmeasured.taken])
        if key in self.costs:
            self.costs[key] = costs
        if self._kept is not None:
            self._kept.keep(family, key[1], kernels, self._max_rows, costs, times)
        log.info(
            "steps measured",
            family=family.manifest.name,
            compute=str(shared.compute),
            compiled=kernels.are_compiled,
            seconds=round(time.monotonic() - started, 1),
            rows_per_second=[
                (rows, round(rows / seconds))
                for rows, seconds in zip(costs.rows, costs.seconds, strict=True)
            ],
            full_rows=costs.full_rows,
            row_bytes=costs.row_bytes,
        )

    def _seconds_a_step(self, batch: Batch, steps: int) -> float:
        seconds = 0.0
        for _ in range(steps):
            if self._wanted or self._others_wait():
                raise Wanted
            self.watch.moved()
            seconds += seconds_a_step(batch, 1)
        return seconds / steps

    @contextlib.contextmanager
    def _failing(self, job: Job) -> Iterator[None]:
        """End this job, and no other, with an error that is raised inside."""
        try:
            yield
        except Exception as error:
            log.exception("a request failed in the engine", model=job.request.model)
            self._end(job, error)

    def _costs_of(self, pool: Pool) -> StepCosts:
        return self._costs(pool.shared)

    def _is_estimated(self, pool: Pool) -> bool:
        left = self._unmeasured.get(_key(pool.shared))
        return left is not None and not left.taken

    def _pool(self, request: SampleRequest) -> Pool:
        full = request.family.full_size.rank  # what is written out has no factors in few bits
        rank = request.rank if request.mode is Mode.FACTORED else full
        return self.residency.pool(request.family, request.dtype, rank)

    def _take_in(self, job: Job) -> None:
        if job.elastic is not None:
            try:
                decided = self._promises.decide(job.elastic, self._parts, self._served)
            except Refused as refusal:
                self._end(job, refusal)
                return
            if decided[0] is not job.request:
                job.own = None
            job.request, job.promise = decided
            job.decided_at = time.monotonic()
        request = job.request
        pool = self._pool(request)
        costs = self._costs(pool.shared)
        if job.elastic is None:
            self._promises.noticed(request, pool)
        target = request.target_seconds
        if job.promise is not None and job.elastic is not None:
            target = job.elastic.deadline - job.arrived_at
        elif target is None:
            step_seconds = costs.step_seconds(max(request.rows, costs.full_rows))
            target = (
                self._latency_target_ratio * request.sampling.num_inference_steps * step_seconds
            )
        job.deadline = job.arrived_at + target
        waiting = {part.owner for part in self._parts}
        self._served = {owner: self._served.get(owner, 0.0) for owner in waiting}
        self._served.setdefault(request.owner, min(self._served.values(), default=0.0))
        most = max(1, costs.full_rows // request.rows_per_image)
        starts = range(0, len(request.seeds), most)
        job.parts = [JobPart(job, slice(start, start + most), pool) for start in starts]
        self._parts += job.parts

    def _compose(self) -> int:
        """Decide who is in the next batches; returns after how many steps to decide again."""
        for job, choice in self._promises.in_danger(self._parts, self._served):
            with self._failing(job):
                self._shrink(job, choice)
        limits = {pool: self._limits(pool) for pool in {part.pool for part in self._parts}}
        chosen = choose(self._parts, self._served, limits.__getitem__, time.monotonic())
        chosen = self._promises.uncrowded(chosen)
        if set(chosen) != set(self._running):
            self._dissolve()
            begun = [part for part in chosen if self._begin(part)]
            if not begun:  # what has begun already must go on, so that there will be room
                begun = [part for part in self._parts if part.state is not None][:1]
            self._running = [part for part in begun if part in self._parts]
            for pool in dict.fromkeys(part.pool for part in self._running):
                parts = [part for part in self._running if part.pool is pool]
                if parts:  # else another batch could not be composed, and all are taken apart
                    self._start_batch(parts)
        steps = min((part.steps_alike for part in self._running), default=0)
        if any(part.job.promise is not None for part in self._running):
            return min(steps, WATCHED_STEPS)
        everybody = len(self._running) == len(self._parts)
        return steps if everybody else min(steps, QUANTUM_STEPS)

    def _shrink(self, job: Job, choice: Choice) -> None:
        """Go on by a smaller size from the next step on, with the images as they are."""
        assert job.elastic is not None
        self._dissolve()
        job.request, job.shrunk = job.elastic.choices[choice], choice
        for part in job.parts:
            if (before := part.state) is not None:
                self._give_back(part)
                part.state = self._prepare(part)
                part.state.x, part.state.previous = before.x, before.previous
                part.state.steps_before = before.done_steps

    def _limits(self, pool: Pool) -> BatchLimits:
        costs = self._costs(pool.shared)
        free = self.residency.budget_bytes - self.residency.nbytes
        rows = min(costs.full_rows, pool.most_rows, free // costs.row_bytes)
        return BatchLimits(rows, costs.step_seconds)

    def _start_batch(self, parts: list[JobPart]) -> None:
        pool, states = parts[0].pool, [part.state for part in parts if part.state is not None]
        try:
            batch = self._composed(states, pool)
            self._batches.append(batch)
            self._expected[batch] = self._promises.expected(parts)
            metrics.BATCH_ROWS.observe(sum(part.rows for part in parts))
            metrics.BATCH_MODELS.observe(len({state.model for state in states}))
        except Exception:
            log.exception("a batch could not be composed", rows=sum(part.rows for part in parts))
            self._isolate(parts)

    def _composed(self, states: Sequence[Part], pool: Pool) -> Batch:
        kernels = self._kernels_of(_key(pool.shared))
        return self._compose_batch(states, pool.tables, pool.stack, kernels)

    def _begin(self, part: JobPart) -> bool:
        """Whether a part has all it needs on the device."""
        if part.state is not None:
            return True
        with self._failing(part.job):
            try:
                part.state = self._prepare(part)
            except OutOfRoom:
                self._give_back(part)
                if not any(other.state is not None for other in self._parts):
                    raise  # there is nothing to wait for
        return part.state is not None

    def _prepare(self, part: JobPart) -> Part:
        request, pool = part.job.request, part.pool
        sampling, shared = request.sampling, pool.shared
        model = self._model(part)
        kind = (sampling.scheduler, sampling.num_inference_steps)
        steps = schedule(request.family.manifest.diffusion, *kind)
        timesteps = steps.timesteps.to(self._device)

        def modulations(of: Hashable, model: ModelWeights, label: int) -> int:
            key = (of, kind, label)
            at = pool.modulations.take(
                key, lambda: model.modulations(timesteps, label).flatten(0, 1)
            )
            part.modulations.append(key)
            return at

        labels = request.class_labels[part.images]
        conditional = [modulations(request.model_key, model, label) for label in labels]
        guide, guiding = model, list[int]()
        if request.load_guide is not None and sampling.guided:
            guide = self._guide(part, request.load_guide, model)
            guiding = [modulations(request.guide_key, guide, label) for label in labels]
        elif sampling.guided:
            guiding = [modulations(request.model_key, model, model.null_class)] * len(labels)
        noise = initial_noise(shared.network, part.seeds).to(self._device)
        return Part(
            model,
            steps,
            pool.coefficients.at(kind, steps),
            conditional,
            sampling.guided,
            guide,
            guiding,
            sampling.guidance_scale,
            noise * steps.initial_scale,
            torch.zeros_like(noise),
        )

    def _model(self, part: JobPart) -> ModelWeights:
        request = part.job.request
        model = self._resident(
            part, request.model_key, request.rank, lambda: part.job.own or request.load()
        )
        part.job.own = None  # of a refined model it is as much as the model
        return model

    def _guide(self, part: JobPart, load: Callable[[], Own], model: ModelWeights) -> ModelWeights:
        request = part.job.request
        assert request.sampling.guide is not None
        return self._resident(part, request.guide_key, request.sampling.guide.rank, load, model)

    def _resident(
        self,
        part: JobPart,
        key: Hashable,
        rank: int,
        load: Callable[[], Own],
        *needed: ModelWeights,
    ) -> ModelWeights:
        """Weights on the device, beside those that are `needed` and those of what has begun."""
        begun = [other.state for other in self._parts if other.state is not None]
        in_use = {*needed, *itertools.chain(*((state.model, state.guide) for state in begun))}
        costs = self._costs(part.pool.shared)
        written_out = part.job.request.mode is Mode.MATERIALISED and not costs.prefers_factored(
            rank
        )
        return self.residency.model(part.pool, key, load, in_use, materialise=written_out)

    def _step(self, batch: Batch) -> bool:
        """Step a batch; False when it failed and has been taken apart."""
        try:
            parts = [part for part in self._running if part.state in batch.parts]
            began = time.perf_counter()
            with (
                metrics.timed(metrics.STEP),
                tracing.tracer.start_as_current_span(
                    "engine step", links=[part.job.link for part in parts]
                ),
            ):
                batch.step()
                synchronise(self._device)
            self._promises.stepped(self._expected[batch], time.perf_counter() - began)
            self.watch.moved()
        except Exception:
            log.exception("a step failed", parts=len(batch.parts))
            self._isolate([part for part in self._running if part.state in batch.parts])
            return False
        return True

    def _isolate(self, parts: list[JobPart]) -> None:
        """Step each part alone, which ends those that fail.

        When none does the batch was too large for the memory, and later ones are smaller.
        """
        self._dissolve()
        release_memory(self._device)
        failed = False
        for part in [part for part in parts if part in self._parts]:
            assert part.state is not None
            try:
                alone = self._composed([part.state], part.pool)
                alone.step()
                alone.settle()
            except Exception as error:
                failed = True
                self._end(part.job, error)
        if failed:
            require_usable(self._device)  # raises where nothing works any more: this engine ends
        else:
            pool = parts[0].pool
            pool.most_rows = max(1, sum(part.rows for part in parts) // 2)
            log.warning("batches are smaller from now on", rows=pool.most_rows)

    def _collect(self) -> None:
        """Finish what is done; what is guided otherwise from now on is composed again."""
        if not any(batch.is_over for batch in self._batches):
            return
        finished = [part for part in self._running if part.left == 0]
        self._dissolve()
        by_stem: dict[Stem, list[JobPart]] = {}
        for part in finished:
            with self._failing(part.job):
                if part in self._parts:
                    self._require_finite(part)
                    by_stem.setdefault(part.job.request.family.stem, []).append(part)
        for stem, parts in by_stem.items():
            if still := [part for part in parts if part in self._parts]:
                self._finish(stem, still)

    def _require_finite(self, part: JobPart) -> None:
        assert part.state is not None
        if not bool(part.state.x.isfinite().all()):
            raise NotFinite(
                f"model {part.job.request.model} makes images that are not numbers; "
                "make it again, or use another revision or scheduler"
            )

    def _finish(self, stem: Stem, parts: list[JobPart]) -> None:
        """Pixels of parts of one family, decoded together, or one by one where that fails."""
        denoised = [part.state.x for part in parts if part.state is not None]
        pixels: Sequence[Tensor] = ()
        try:
            pixels = self._decoded(stem, torch.cat(denoised)).split([len(x) for x in denoised])
        except Exception:
            log.exception("images cannot be decoded together", parts=len(parts))
        if not pixels:  # only now is the memory free that it held
            release_memory(self._device)
        for i, part in enumerate(parts):
            with self._failing(part.job):
                if part in self._parts:
                    images = pixels[i] if pixels else self._decoded(stem, denoised[i], 1)
                    self._parts.remove(part)
                    self._give_back(part)
                    part.job.keep(part, list(images.numpy()))
                    if part.job.done:
                        self._promises.ended(part.job)

    def _decoded(self, stem: Stem, x: Tensor, at_once: int | None = None) -> Tensor:
        """Images (uint8, (N, C, H, W)), decoded a few at a time so that the watch sees it move."""

        def pixels(few: Tensor) -> Tensor:
            images = stem.pixels(few)
            self.watch.moved()
            return images

        if at_once:
            return torch.cat([pixels(few) for few in x.split(at_once)])
        runs = [functools.partial(pixels, few) for few in x.split(decoded_together(self._device))]
        return torch.cat(self.lanes.run(runs))

    def _dissolve(self) -> None:
        """Give all images back to their parts, and count the rows of their owners."""
        for part in self._running:
            if part.state is not None and part.state.batch is not None:
                rows = part.rows_at(part.state.steps_before)
                self._served[part.owner] += rows * part.state.batch.steps_run
        for batch in self._batches:
            batch.settle()
        self._batches, self._running, self._expected = [], [], {}

    def _end(self, job: Job, error: Exception) -> None:
        if job.done:
            return
        if any(part in self._running for part in job.parts):
            self._dissolve()
        for part in job.parts:
            self._give_back(part)
        self._parts = [part for part in self._parts if part.job is not job]
        job.fail(error)

    def _give_back(self, part: JobPart) -> None:
        for key in part.modulations:
            part.pool.modulations.give_back(key)
        part.modulations = []


def _key(shared: SharedWeights) -> Key:
    return shared.family.fingerprint, shared.compute
