import random
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
import pytest
import torch

from learngenes.batch import Batch, Part
from learngenes.config import DType, Mode, Size
from learngenes.diffusion import SAMPLERS
from learngenes.factors import Scales
from learngenes.family import Family
from learngenes.kernels import Kernels
from learngenes.sampling import sample
from learngenes.stepcost import StepCosts
from tests.batches import other_scales
from worker.engine import Engine
from worker.tickets import EngineStopped, NotFinite, Pixels, Request, Ticket

FULL_ROWS = 12
SECONDS = 60.0
"""Nothing here takes so long; a test that waits for more has failed."""
AMPLE = 50_000_000


def made_up_costs(*_: object) -> StepCosts:
    """W is always faster, so that a model's mode is the one that is asked for."""
    return StepCosts((1, 64), (0.001, 0.01), FULL_ROWS, 40_000, {48: 2.0})


class Gate:
    """Batches step when they are let: all at first."""

    def __init__(self) -> None:
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

    def enter(self, batch: Batch) -> None:
        with self._changed:
            self._waiting = self._allowed < 1
            self._changed.notify_all()
            assert self._changed.wait_for(lambda: self._allowed >= 1, SECONDS)
            self._allowed -= 1
            self.sizes.append(sum(len(part.x) for part in batch.parts))


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    gate, step = Gate(), Batch.step

    def gated(batch: Batch) -> None:
        gate.enter(batch)
        step(batch)

    monkeypatch.setattr(Batch, "step", gated)
    return gate


@pytest.fixture
def engine(family: Family, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Engine]:
    monkeypatch.setattr("worker.engine.measure_step_costs", made_up_costs)
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.start()
    yield engine
    gate.open()
    engine.stop()


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


def ask(family: Family, model: Model | None = None, images: int = 2, **changes: Any) -> Request:
    model = model or Model()
    fields: dict[str, Any] = {
        "family": family,
        "model": str(model),
        "revision": 0,
        "rank": model.rank,
        "mode": model.mode,
        "dtype": model.dtype,
        "load": lambda: model.scales(family),
        "class_labels": [i % 5 for i in range(images)],
        "seeds": list(range(images)),
        "num_inference_steps": 3,
        "target_seconds": inf,
    }
    return Request(**{**fields, **changes})


def images_of(ticket: Ticket) -> list[Pixels]:
    assert ticket.wait(SECONDS)
    return ticket.images()


def alone(engine: Engine, request: Request) -> list[Pixels]:
    """Of a request when the engine has nothing else to do."""
    return images_of(engine.submit(request))


def same(ours: Sequence[Pixels], theirs: Sequence[Pixels]) -> bool:
    return len(ours) == len(theirs) and all(map(np.array_equal, ours, theirs))


def reference(family: Family, model: Model, request: Request) -> np.ndarray:
    """By the model's own network and diffusers' scheduler."""
    images = sample(
        family.assemble(model.scales(family), model.mode, model.dtype),
        family.manifest.diffusion,
        request.class_labels,
        request.seeds,
        num_inference_steps=request.num_inference_steps,
        guidance_scale=request.guidance_scale,
        scheduler=request.scheduler,
    )
    return images.numpy().astype(int)


# Images


def random_model(generator: random.Random) -> Model:
    dtype = generator.choice(list(DType))
    mode = Mode.FACTORED if dtype is DType.INT8 else generator.choice(list(Mode))
    rank = generator.randint(2, 48)  # torchao cannot quantise one column
    return Model(generator.randrange(10), generator.choice((2, 3, 4)), rank, mode, dtype)


@pytest.mark.parametrize("seed", range(4))
def test_requests_that_come_and_go_together_get_the_images_they_get_alone(
    engine: Engine, gate: Gate, family: Family, seed: int
) -> None:
    generator = random.Random(seed)
    models = [random_model(generator) for _ in range(7)]
    requests = [
        ask(
            family,
            generator.choice(models),
            images=(images := generator.randint(1, 4)),
            class_labels=[generator.randrange(5) for _ in range(images)],
            seeds=[generator.randrange(10_000) for _ in range(images)],
            num_inference_steps=generator.randint(1, 12) if i else 100,
            guidance_scale=generator.choice([1.0, 1.5, 4.0]),
            scheduler=generator.choice(SAMPLERS),
            owner=generator.choice("ab"),
            target_seconds=generator.choice([0.01, 1.0, None]),
        )
        for i in range(20)
    ]
    gate.close()
    tickets, cancelled = [], set()
    for i, request in enumerate(requests):
        tickets.append(engine.submit(request))
        if i == 0:
            gate.reached()
        elif generator.random() < 0.5:
            gate.allow(generator.randint(1, 4))
        if i and generator.random() < 0.25:
            chosen = generator.choice(tickets[1:])
            cancelled.add(chosen)
            engine.cancel(chosen)
    gate.open()
    finished = []
    for request, ticket in zip(requests, tickets, strict=True):
        assert ticket.wait(SECONDS)
        if ticket in cancelled and isinstance(ticket.error, EngineStopped):
            continue
        finished.append((request, ticket.images()))
    assert len(finished) >= 10
    assert max(gate.sizes) > 4  # they did run together
    wrong = [request for request, images in finished if not same(alone(engine, request), images)]
    assert wrong == []


@pytest.mark.parametrize("mode", Mode)
@pytest.mark.parametrize("scheduler", SAMPLERS)
def test_images_are_those_of_the_models_own_network(
    engine: Engine, family: Family, mode: Mode, scheduler: str
) -> None:
    model = Model(mode=mode)
    request = ask(family, model, 3, scheduler=scheduler)
    difference = np.stack(alone(engine, request)) - reference(family, model, request)
    assert np.abs(difference).max() <= 1


@pytest.mark.parametrize("guidance_scale", [1.0, 2.0])
def test_more_images_than_fit_in_a_batch_come_whole_and_in_order(
    engine: Engine, gate: Gate, family: Family, guidance_scale: float
) -> None:
    request = ask(family, images=20, guidance_scale=guidance_scale)
    images = alone(engine, request)
    per_batch = FULL_ROWS // request.rows_per_image
    assert max(gate.sizes) == per_batch
    single = [
        alone(
            engine,
            ask(family, class_labels=[label], seeds=[seed], guidance_scale=guidance_scale),
        )
        for label, seed in zip(request.class_labels, request.seeds, strict=True)
    ]
    assert same(images, [image for (image,) in single])


def test_one_image_may_be_larger_than_a_batch(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    costs = StepCosts((1,), (0.001,), 1, 1, {48: 2.0})
    monkeypatch.setattr("worker.engine.measure_step_costs", lambda *_: costs)
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.start()
    assert len(alone(engine, ask(family, images=3))) == 3
    engine.stop()


def test_hundreds_of_models_share_a_device_that_has_room_for_some(
    engine: Engine, gate: Gate, family: Family
) -> None:
    generator = random.Random(0)
    models = [
        Model(seed, generator.choice((2, 3, 4)), generator.choice((8, 24, 48)), mode)
        for seed, mode in ((seed, generator.choice(list(Mode))) for seed in range(300))
    ]
    room_for(engine, 2_000_000)  # their Sigma are 2 MB, their W 22
    asked = generator.sample(models, 300) + generator.choices(models, k=60)
    requests = [
        ask(family, model, 1, num_inference_steps=2, guidance_scale=1.0, seeds=[i])
        for i, model in enumerate(asked)
    ]
    gate.close()
    tickets = [engine.submit(request) for request in requests]
    gate.open()
    images = [images_of(ticket) for ticket in tickets]
    worst = max(
        np.abs(ours[0] - reference(family, model, request)[0]).max()
        for model, request, ours in zip(asked, requests, images, strict=True)
    )
    assert worst <= 1
    assert len([m for m in models if engine.residency.knows((str(m), 0))]) < 290


# Coming and going


def test_a_short_request_that_comes_during_a_long_one_is_done_first(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    long = engine.submit(ask(family, num_inference_steps=100))
    gate.reached()
    short = engine.submit(ask(family, Model(1)))
    gate.allow(6)
    assert short.wait(SECONDS)
    assert not long.done
    assert 3 <= long.progress[0] <= 7
    gate.open()
    assert same(images_of(long), alone(engine, long.request))
    assert same(images_of(short), alone(engine, short.request))


def test_a_cancelled_request_leaves_the_others_as_they_are(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    tickets = [engine.submit(ask(family, Model(i), num_inference_steps=8)) for i in range(3)]
    gate.reached()
    gate.allow(3)
    engine.cancel(tickets[1])
    gate.allow(2)
    assert tickets[1].done
    with pytest.raises(EngineStopped, match="cancelled"):
        tickets[1].images()
    gate.open()
    for ticket in (tickets[0], tickets[2]):
        assert same(images_of(ticket), alone(engine, ticket.request))


def test_a_request_can_be_cancelled_before_it_has_begun(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    first = engine.submit(ask(family, images=6))
    gate.reached()
    second = engine.submit(ask(family, Model(1), images=6))
    engine.cancel(second)
    gate.open()
    with pytest.raises(EngineStopped):
        images_of(second)
    assert len(images_of(first)) == 6


def test_cancelling_what_is_done_changes_nothing(engine: Engine, family: Family) -> None:
    ticket = engine.submit(ask(family))
    images = images_of(ticket)
    engine.cancel(ticket)
    alone(engine, ask(family, Model(1)))
    assert ticket.error is None
    assert same(ticket.images(), images)


def test_a_cancelled_request_of_several_batches_ends_as_a_whole(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    ticket = engine.submit(ask(family, images=20))
    gate.reached()
    gate.allow(4)  # one batch of three steps, and some of the next
    engine.cancel(ticket)
    gate.open()
    with pytest.raises(EngineStopped):
        images_of(ticket)
    assert len(alone(engine, ask(family, Model(1)))) == 2


def test_progress_counts_steps(engine: Engine, gate: Gate, family: Family) -> None:
    gate.close()
    ticket = engine.submit(ask(family, num_inference_steps=9))
    gate.reached()
    assert ticket.progress == (0, 9)
    gate.allow(4)
    assert ticket.progress == (4, 9)


def test_a_model_is_loaded_once(engine: Engine, family: Family) -> None:
    loads = []

    def load() -> Scales:
        loads.append(threading.current_thread())
        return Model().scales(family)

    for _ in range(3):
        alone(engine, ask(family, load=load))
    assert loads == [threading.current_thread()]
    alone(engine, ask(family, load=load, revision=1))
    assert len(loads) == 2


def test_the_end_of_the_engine_is_the_end_of_its_requests(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    tickets = [engine.submit(ask(family, Model(i), 6, num_inference_steps=50)) for i in range(4)]
    gate.reached()
    with ThreadPoolExecutor() as pool:
        stopped = pool.submit(engine.stop)
        gate.open()
        stopped.result(SECONDS)
    for ticket in tickets:
        with pytest.raises(EngineStopped, match="stopped"):
            images_of(ticket)
    with pytest.raises(EngineStopped, match="not running"):
        engine.submit(ask(family))


def test_requests_may_come_from_many_threads(engine: Engine, family: Family) -> None:
    requests = [ask(family, Model(i % 4), 1, seeds=[i]) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(lambda request: alone(engine, request), requests))
    assert all(
        same(ours, alone(engine, request)) for ours, request in zip(images, requests, strict=True)
    )


# Previews


def test_a_preview_is_what_an_image_is_taken_to_be(engine: Engine, family: Family) -> None:
    ticket = engine.submit(ask(family, num_inference_steps=250))
    while (preview := engine.preview(ticket, SECONDS)) is None:
        assert not ticket.done
    assert preview.shape == (3, 8, 8)
    assert preview.dtype == np.uint8
    while not ticket.done:
        engine.preview(ticket, SECONDS)
    assert same(images_of(ticket), alone(engine, ticket.request))


def test_there_is_no_preview_before_the_first_step_or_after_the_last(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    first = engine.submit(ask(family, images=6))
    gate.reached()
    waiting = engine.submit(ask(family, Model(1), images=6))
    assert engine.preview(waiting, 0.01) is None
    gate.open()
    images_of(first)
    images_of(waiting)
    assert engine.preview(waiting, SECONDS) is None


# What fails


class Lost(Exception):
    pass


def test_what_cannot_be_loaded_is_not_taken(engine: Engine, family: Family) -> None:
    def lost() -> Scales:
        raise Lost

    with pytest.raises(Lost):
        engine.submit(ask(family, load=lost))
    assert len(alone(engine, ask(family))) == 2


def test_what_is_gone_when_it_is_to_be_loaded_again_fails_alone(
    engine: Engine, gate: Gate, family: Family
) -> None:
    loads = [Model(1).scales(family)]

    def once() -> Scales:
        if not loads:
            raise Lost
        return loads.pop()

    alone(engine, ask(family, Model(1), load=once))
    gate.close()
    running = engine.submit(ask(family))
    gate.reached()
    gone = engine.submit(ask(family, Model(1), load=once))
    engine.residency.pool(family, DType.FLOAT32, 24).models.clear()
    gate.open()
    with pytest.raises(Lost):
        images_of(gone)
    assert same(images_of(running), alone(engine, running.request))


@pytest.mark.parametrize("mode", Mode)
def test_a_model_of_no_numbers_fails_and_its_neighbours_do_not(
    engine: Engine, gate: Gate, family: Family, mode: Mode
) -> None:
    def broken() -> Scales:
        scales = Model(1).scales(family)
        for parameter in scales.parameters():
            torch.nn.init.constant_(parameter, torch.nan)
        return scales

    gate.close()
    first = engine.submit(ask(family, Model(0, mode=mode)))
    gate.reached()
    bad = engine.submit(ask(family, Model(1, mode=mode), load=broken))
    last = engine.submit(ask(family, Model(2, mode=mode)))
    gate.open()
    with pytest.raises(NotFinite, match="not numbers"):
        images_of(bad)
    for ticket in (first, last):
        assert same(images_of(ticket), alone(engine, ticket.request))
    assert max(gate.sizes) > 2


@pytest.mark.parametrize(
    "changes", [{"scheduler": "heun"}, {"num_inference_steps": 0}, {"class_labels": [7, 99]}]
)
def test_a_request_that_makes_no_sense_fails_alone(
    engine: Engine, gate: Gate, family: Family, changes: dict[str, Any]
) -> None:
    gate.close()
    good = engine.submit(ask(family))
    gate.reached()
    bad = engine.submit(ask(family, Model(1), **changes))
    gate.open()
    assert bad.wait(SECONDS)
    assert bad.error is not None
    assert not isinstance(bad.error, EngineStopped)
    assert same(images_of(good), alone(engine, good.request))


def failing_step(monkeypatch: pytest.MonkeyPatch, fails: Callable[[list[Part]], bool]) -> list[int]:
    """Rows of the batches that failed."""
    step, failed = Batch.step, []

    def step_or_fail(batch: Batch) -> None:
        if fails(batch.parts):
            failed.append(sum(len(part.x) for part in batch.parts))
            raise Lost
        step(batch)

    monkeypatch.setattr(Batch, "step", step_or_fail)
    return failed


def test_a_request_whose_steps_fail_fails_alone(
    engine: Engine, gate: Gate, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failing_step(monkeypatch, lambda parts: any(p.model.depth == 3 for p in parts))
    gate.close()
    tickets = [engine.submit(ask(family, Model(0), num_inference_steps=10))]
    gate.reached()
    tickets += [
        engine.submit(ask(family, Model(i, depth), num_inference_steps=10))
        for i, depth in ((1, 3), (2, 4))
    ]
    gate.open()
    with pytest.raises(Lost):
        images_of(tickets[1])
    assert failed == [6, 2]
    for ticket in (tickets[0], tickets[2]):
        assert same(images_of(ticket), alone(engine, ticket.request))
    assert failed == [6, 2]


def test_batches_are_halved_when_only_large_ones_fail(
    engine: Engine, gate: Gate, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = failing_step(monkeypatch, lambda parts: sum(len(p.x) for p in parts) > 2)
    gate.close()
    tickets = [engine.submit(ask(family, Model(0), 1, num_inference_steps=10))]
    gate.reached()
    tickets += [
        engine.submit(ask(family, Model(i), 1, num_inference_steps=10)) for i in range(1, 6)
    ]
    gate.open()
    images = [images_of(ticket) for ticket in tickets]
    assert failed == [6, 3]
    assert engine.residency.pool(family, DType.FLOAT32, 24).most_rows == 3
    assert all(
        same(ours, alone(engine, ticket.request))
        for ours, ticket in zip(images, tickets, strict=True)
    )


@pytest.fixture
def only_single_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two parts cannot be composed."""

    class Small(Batch):
        def __init__(self, parts: Sequence[Part], *rest: Any) -> None:
            if len(parts) > 1:
                raise Lost
            super().__init__(parts, *rest)

    monkeypatch.setattr("worker.engine.Batch", Small)


def test_a_batch_that_cannot_be_composed_is_made_smaller(
    engine: Engine, gate: Gate, family: Family, only_single_parts: None
) -> None:
    gate.close()
    tickets = [engine.submit(ask(family, Model(0)))]
    gate.reached()
    tickets += [engine.submit(ask(family, Model(i))) for i in range(1, 4)]
    gate.open()
    for ticket in tickets:
        assert same(images_of(ticket), alone(engine, ticket.request))


# Room


def test_requests_wait_until_there_is_room_for_their_models(
    engine: Engine, gate: Gate, family: Family
) -> None:
    """Room for one, and all are asked for at once."""
    images = {i: alone(engine, ask(family, Model(i, mode=Mode.FACTORED))) for i in range(5)}
    pool = engine.residency.pool(family, DType.FLOAT32, 24)
    one = next(iter(pool.models.values())).nbytes
    pool.models.clear()
    room_for(engine, int(1.5 * one))
    gate.close()
    tickets = {i: engine.submit(ask(family, Model(i, mode=Mode.FACTORED))) for i in range(5)}
    gate.open()
    assert all(same(images_of(ticket), images[i]) for i, ticket in tickets.items())
    assert len(pool.models) == 1


def test_a_model_that_never_fits_is_refused(engine: Engine, family: Family) -> None:
    room_for(engine, 100)
    with pytest.raises(Exception, match="no room"):
        alone(engine, ask(family))


def small_table(engine: Engine, family: Family, rows: int) -> None:
    table = engine.residency.pool(family, DType.FLOAT32, 24).modulations
    table.max_rows, table.rows = rows, table.rows[:rows]


def test_requests_wait_until_there_is_room_for_their_modulations(
    engine: Engine, gate: Gate, family: Family
) -> None:
    small_table(engine, family, 30)  # a guided image of three steps has 2 * 3 * 3
    requests = [ask(family, Model(i), 1) for i in range(5)]
    gate.close()
    tickets = [engine.submit(request) for request in requests]
    gate.open()
    for ticket in tickets:
        assert same(images_of(ticket), alone(engine, ticket.request))
    assert max(gate.sizes) == 1


def test_a_request_of_too_many_steps_fails_alone(
    engine: Engine, gate: Gate, family: Family
) -> None:
    small_table(engine, family, 100)
    gate.close()
    good = engine.submit(ask(family))
    gate.reached()
    bad = engine.submit(ask(family, Model(1), num_inference_steps=40))
    gate.open()
    with pytest.raises(ValueError, match="fewer num_inference_steps"):
        images_of(bad)
    assert len(images_of(good)) == 2


# Turns


def test_an_owner_of_one_request_does_not_wait_for_anothers_many(
    engine: Engine, gate: Gate, family: Family
) -> None:
    """Each request is a full batch of 16 steps."""
    gate.close()
    many = [
        engine.submit(ask(family, Model(i), 6, num_inference_steps=16, owner="many"))
        for i in range(8)
    ]
    gate.reached()
    one = engine.submit(ask(family, Model(9), 6, num_inference_steps=16, owner="one"))
    gate.allow(48)
    assert one.done
    assert sum(ticket.done for ticket in many) <= 3
    gate.open()
    assert all(len(images_of(ticket)) == 6 for ticket in many)


def test_of_one_owner_the_request_that_is_due_first_is_first(
    engine: Engine, gate: Gate, family: Family
) -> None:
    gate.close()
    late = engine.submit(ask(family, Model(0), 6, num_inference_steps=40))
    gate.reached()
    early = engine.submit(ask(family, Model(1), 6, num_inference_steps=8, target_seconds=5))
    gate.allow(10)
    assert early.done
    assert not late.done
    gate.open()
    assert len(images_of(late)) == 6


@pytest.mark.parametrize(("target_seconds", "images"), [(None, 8), (24.0, 4), (12.0, 2)])
def test_a_full_batch_is_late_for_nobody_but_those_with_a_target(
    family: Family,
    gate: Gate,
    monkeypatch: pytest.MonkeyPatch,
    target_seconds: float | None,
    images: int,
) -> None:
    costs = StepCosts((4, 16), (1.0, 20.0), 16, 1, {48: 2.0})  # three steps of 8 rows: 22 s
    monkeypatch.setattr("worker.engine.measure_step_costs", lambda *_: costs)
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.start()
    gate.close()
    requests = [ask(family, Model(seed), target_seconds=target_seconds) for seed in range(4)]
    tickets = [engine.submit(requests[0])]
    gate.reached()
    tickets += [engine.submit(request) for request in requests[1:]]
    gate.allow(2)
    assert gate.sizes[-1] == images
    gate.open()
    assert all(len(images_of(ticket)) == 2 for ticket in tickets)
    engine.stop()


# Beginning


def test_what_a_step_costs_is_measured_for_every_dtype_before_it_is_ready(family: Family) -> None:
    engine = Engine([family], AMPLE, max_rows=4, compile_kernels=False)
    engine.start()
    assert {key[0] for key in engine.costs} == {family.fingerprint}
    assert torch.float32 in {key[1] for key in engine.costs}
    assert all(costs.rows[-1] <= 4 for costs in engine.costs.values())
    assert len(alone(engine, ask(family, Model(dtype=DType.BFLOAT16)))) == 2
    engine.stop()


def test_an_engine_that_cannot_begin_says_so(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> StepCosts:
        raise Lost

    monkeypatch.setattr("worker.engine.measure_step_costs", broken)
    engine = Engine([family], AMPLE, compile_kernels=False)
    with pytest.raises(EngineStopped, match="did not start"):
        engine.start()
    with pytest.raises(EngineStopped):
        engine.submit(ask(family))


def test_without_a_compiler_it_runs_uncompiled(
    family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Uncompilable(Kernels):
        def warm_up(self, shared: object) -> None:
            raise Lost("no C++ compiler")

    monkeypatch.setattr(Kernels, "compiled", lambda device: Uncompilable())
    monkeypatch.setattr("worker.engine.measure_step_costs", made_up_costs)
    engine = Engine([family], AMPLE)
    engine.start()
    assert len(alone(engine, ask(family))) == 2
    engine.stop()


def test_progress_ends_at_its_end(engine: Engine, gate: Gate, family: Family) -> None:
    gate.close()
    ticket = engine.submit(ask(family, images=20))
    gate.reached()
    seen = [ticket.progress]
    for _ in range(11):
        gate.allow(1)
        seen.append(ticket.progress)
    gate.open()
    images_of(ticket)
    seen.append(ticket.progress)
    assert seen == sorted(seen)
    assert seen[-1] == (12, 12)


def test_a_batch_of_another_dtype_that_cannot_be_composed_does_not_end_the_engine(
    engine: Engine, gate: Gate, family: Family, only_single_parts: None
) -> None:
    gate.close()
    tickets = [engine.submit(ask(family, Model(0)))]
    gate.reached()
    tickets += [
        engine.submit(ask(family, Model(i, dtype=dtype)))
        for i in (1, 2)
        for dtype in (DType.FLOAT32, DType.BFLOAT16)
    ]
    gate.open()
    for ticket in tickets:
        assert len(images_of(ticket)) == 2


def test_an_engine_that_never_began_can_be_stopped(family: Family) -> None:
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.stop()
    with pytest.raises(EngineStopped):
        engine.submit(ask(family))


def test_models_that_ran_together_leave_room_for_others(
    engine: Engine, gate: Gate, family: Family
) -> None:
    for i in range(12):
        alone(engine, ask(family, Model(i, 4), 1))
    pool = engine.residency.pool(family, DType.FLOAT32, 24)
    model = next(iter(pool.models.values()))
    own, w = model.nbytes, model.materialised_nbytes
    pool.models.clear()
    room_for(engine, 12 * own + 13 * w)
    gate.close()
    tickets = [engine.submit(ask(family, Model(i, 4), 1, guidance_scale=1.0)) for i in range(12)]
    gate.reached()
    gate.open()
    for ticket in tickets:
        images_of(ticket)
    assert len(alone(engine, ask(family, Model(99), 1))) == 1
    assert engine.residency.nbytes <= engine.residency.budget_bytes
