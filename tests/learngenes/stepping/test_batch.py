import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from learngenes.config import SHARED_MODES, DType, Mode, Scheduler, Size
from learngenes.data.latents import to_pixels
from learngenes.family.family import Family
from learngenes.model.dense import materialised
from learngenes.model.factors import DenseLayers
from learngenes.model.sampling import sample
from learngenes.stepping import arithmetic
from learngenes.stepping.batch import Part, Stack
from learngenes.stepping.kernels import CompiledGraphs, Kernels, graphs
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.weights import ModelWeights, SharedWeights
from tests.support.batches import Desk, other_scales, random_models, weights
from tests.support.sizing import EXECUTIONS

LANES = [Lanes(count) for count in (1, 2, 3)]
LABELS, SEEDS = [0, 1, 4], [7, 8, 9]


@pytest.fixture
def floats(family: Family) -> Desk:
    return Desk(SharedWeights(family, DType.FLOAT32))


@pytest.fixture(params=[DType.FLOAT32, DType.BFLOAT16])
def desk(family: Family, request: pytest.FixtureRequest) -> Desk:
    return Desk(SharedWeights(family, request.param))


def run_at_random(parts: Sequence[Part], desk: Desk, generator: random.Random) -> None:
    """Each time some of them, in any order and on any number of lanes, for some steps."""
    stack = Stack(desk.shared)
    while unfinished := [part for part in parts if not part.finished]:
        chosen = generator.sample(unfinished, generator.randint(1, len(unfinished)))
        batch = desk.batch(chosen, Kernels(lanes=generator.choice(LANES)), stack)
        for _ in range(generator.randint(1, batch.steps_left)):
            batch.step()
        batch.settle()


def assert_as_if_alone(
    parts: Sequence[Part], desk: Desk, generator: random.Random | None = None
) -> None:
    """Beside each other at random, or else all in one batch."""
    alone = [desk.alone(part) for part in parts]
    if generator is None:
        desk.run(parts, len(parts[0].schedule))
    else:
        run_at_random(parts, desk, generator)
    assert [i for i, x in enumerate(alone) if not torch.equal(parts[i].x, x)] == []


def assert_random_neighbours_make_no_difference(
    desk: Desk, seed: int, models: int, parts: int, modes: Sequence[Mode] = SHARED_MODES
) -> None:
    generator = random.Random(seed)
    chosen = random_models(desk.shared, models, generator, modes)
    drawn = [desk.random_part(generator.choice(chosen), generator) for _ in range(parts)]
    assert_as_if_alone(drawn, desk, generator)


# Against diffusers' schedulers and one model at a time


@pytest.mark.parametrize("scheduler", Scheduler)
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
@pytest.mark.parametrize(("mode", "dtype"), EXECUTIONS)
def test_images_are_those_of_the_models_own_network(
    family: Family, mode: Mode, dtype: DType, guidance_scale: float, scheduler: Scheduler
) -> None:
    how: dict[str, Any] = {
        "num_inference_steps": 6,
        "guidance_scale": guidance_scale,
        "scheduler": scheduler,
    }
    for depth, rank in ((2, 8), (3, 24), (4, 5), (4, 48)):
        scales = family.scales_of(Size(depth=depth, rank=rank))

        def reference(mode: Mode, dtype: DType, scales: Any = scales) -> Tensor:
            model = family.assemble(scales, mode, dtype)
            return sample(model, family.manifest.diffusion, LABELS, SEEDS, **how).float()

        desk = Desk(SharedWeights(family, dtype, None if dtype.bits is None else rank))
        part = desk.part(weights(desk.shared, scales, mode), LABELS, SEEDS, **how)
        images, expected = to_pixels(desk.alone(part)).float(), reference(mode, dtype)
        if desk.shared.compute is torch.float32:
            assert (images - expected).abs().max() <= 1
            continue
        # bfloat16 rounds at other places here than there, and random weights amplify that. So
        # both are compared to float32: this network rounds less often, and was at most 0.93 times
        # as far from it. From each other they were at most 1.7 of 255 away, in the mean.
        exact = reference(Mode.FACTORED, DType.FLOAT32)
        own_error, error = ((x - exact).abs().mean() for x in (expected, images))
        assert error <= 1.2 * own_error + 0.1
        assert (images - expected).abs().mean() <= 3


GUIDES = [
    {"guidance_start": 0.2, "guidance_stop": 0.8},
    {"guide": Size(depth=2, rank=8)},
    {"guide": Size(depth=2, rank=24), "guidance_start": 0.5},
]


@pytest.mark.parametrize("guidance", GUIDES)
@pytest.mark.parametrize("mode", SHARED_MODES)
def test_guided_images_are_those_of_the_networks_of_model_and_guide(
    family: Family, mode: Mode, guidance: dict[str, Any]
) -> None:
    desk, how = Desk(SharedWeights(family, DType.FLOAT32)), {"num_inference_steps": 5}
    scales = family.scales_of(Size(depth=4, rank=48))
    networks, others = {}, {}
    if (size := guidance.get("guide")) is not None:
        smaller = family.scales_of(size)
        networks = {"guide": family.assemble(smaller, mode)}
        others = {"guide": weights(desk.shared, smaller, mode)}
    model, diffusion = family.assemble(scales, mode), family.manifest.diffusion
    expected = sample(model, diffusion, LABELS, SEEDS, **{**how, **guidance, **networks}).float()
    own = weights(desk.shared, scales, mode)
    part = desk.part(own, LABELS, SEEDS, **{**how, **guidance, **others})
    images = to_pixels(desk.alone(part)).float()
    assert (images - expected).abs().max() <= 1
    unguided = sample(model, diffusion, LABELS, SEEDS, guidance_scale=1, **how).float()
    assert (images - unguided).abs().max() > 1


# Neighbours in a batch make no difference, to the last bit


@pytest.mark.parametrize("seed", range(12))
def test_an_image_does_not_depend_on_what_runs_beside_it(desk: Desk, seed: int) -> None:
    assert_random_neighbours_make_no_difference(desk, seed, models=6, parts=10)


def test_an_int8_image_does_not_depend_on_what_runs_beside_it(family: Family) -> None:
    for seed in range(4):
        desk = Desk(SharedWeights(family, DType.INT8, 48))
        assert_random_neighbours_make_no_difference(desk, seed, models=4, parts=8)


@pytest.mark.parametrize("mode", SHARED_MODES)
@pytest.mark.parametrize(("models", "parts"), [(1, 6), (5, 8)])
def test_requests_of_one_mode_do_not_disturb_each_other(
    desk: Desk, mode: Mode, models: int, parts: int
) -> None:
    for seed in range(6):
        assert_random_neighbours_make_no_difference(desk, seed, models, parts, [mode])


@pytest.mark.parametrize("mode", SHARED_MODES)
def test_one_deep_model_among_shallow_ones_is_as_if_alone(desk: Desk, mode: Mode) -> None:
    """Its last layers run for its own rows only."""
    models = [desk.model(mode, depth, seed=i) for i, depth in enumerate((2, 4, 2, 3, 2))]
    for scale, n in itertools.product((1.0, 3.0), (1, 2)):
        parts = [desk.part(m, LABELS[:n], SEEDS[:n], guidance_scale=scale) for m in models]
        assert_as_if_alone(parts, desk, random.Random(0))


def test_factored_models_of_different_ranks_do_not_change_each_other(floats: Desk) -> None:
    models = [floats.model(Mode.FACTORED, 3, rank, rank) for rank in (1, 5, 11, 24, 48)]
    assert_as_if_alone([floats.part(model, LABELS, SEEDS) for model in models], floats)


def test_a_materialised_model_beside_a_factored_one_is_as_if_alone(desk: Desk) -> None:
    parts = [desk.part(desk.model(mode, depth=3), LABELS, SEEDS) for mode in SHARED_MODES]
    assert_as_if_alone(parts, desk, random.Random(0))
    assert (to_pixels(parts[0].x).int() - to_pixels(parts[1].x).int()).abs().float().mean() <= 3


def test_unequal_numbers_of_rows_of_several_models(desk: Desk) -> None:
    models = [desk.model(Mode.MATERIALISED, depth, seed=depth) for depth in (2, 3, 4)]
    for counts in itertools.product((1, 2, 3), repeat=3):
        parts = [
            desk.part(model, LABELS[:count], SEEDS[:count], num_inference_steps=2)
            for model, count in zip(models, counts, strict=True)
        ]
        assert_as_if_alone(parts, desk)


def test_a_model_of_numbers_that_are_not_finite_spoils_its_own_images_only(desk: Desk) -> None:
    parts = []
    for i, mode in enumerate([*SHARED_MODES, *SHARED_MODES]):
        scales = other_scales(desk.shared.family, Size(depth=3, rank=24), i)
        if i % 2:
            with torch.no_grad():
                scales.layers()[1].sigma["qkv"][0] = torch.nan
        parts.append(desk.part(weights(desk.shared, scales, mode), LABELS, SEEDS))
    alone = [desk.alone(part) for part in parts]
    desk.run(parts, 4)
    assert [bool(part.x.isfinite().all()) for part in parts] == [True, False, True, False]
    assert all(torch.equal(parts[i].x, alone[i]) for i in (0, 2))


def test_a_fused_attention_kernel_makes_no_difference(
    floats: Desk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Images of more tokens than these have are computed by one."""
    generator = random.Random(0)
    models = random_models(floats.shared, 4, generator)
    parts = [floats.random_part(model, generator) for model in models]
    written_out = [to_pixels(floats.alone(part)).int() for part in parts]
    monkeypatch.setattr(arithmetic, "FEW_TOKENS", 0)
    assert_as_if_alone(parts, floats, generator)
    for part, image in zip(parts, written_out, strict=True):
        assert (to_pixels(part.x).int() - image).abs().max() <= 1


# What a batch tells


def test_every_part_counts_the_steps_that_it_was_in(floats: Desk) -> None:
    model = floats.model(Mode.FACTORED)
    long, short = (floats.part(model, [0], [n], num_inference_steps=n) for n in (5, 3))
    assert (long.done_steps, long.finished) == (0, False)
    floats.run([long], 2)
    batch = floats.batch([long, short])
    assert batch.steps_left == 3
    batch.step()
    assert (long.done_steps, short.done_steps, batch.steps_left) == (3, 1, 2)
    batch.step()
    batch.step()
    assert (long.finished, short.finished, batch.steps_left) == (True, True, 0)
    batch.settle()
    assert (long.done_steps, short.done_steps) == (5, 3)
    assert (long.batch, short.batch) == (None, None)


def test_images_are_with_the_batch_until_it_is_settled(floats: Desk) -> None:
    model = floats.model(Mode.FACTORED)
    one, three = floats.part(model, [2], [1]), floats.part(model, LABELS, SEEDS)
    before = three.x.clone()
    batch = floats.batch([one, three])
    batch.step()
    assert torch.equal(three.x, before)
    predicted = batch.predicted(three)
    batch.settle()
    assert (one.x.shape[0], three.x.shape[0]) == (1, 3)
    assert not torch.equal(three.x, before)
    assert torch.equal(three.previous, predicted)


@pytest.mark.parametrize("scheduler", Scheduler)
def test_what_is_predicted_at_the_last_step_is_the_image(
    floats: Desk, scheduler: Scheduler
) -> None:
    part = floats.part(floats.model(Mode.FACTORED), LABELS, SEEDS, scheduler=scheduler)
    batch, predictions = floats.batch([part]), []
    for _ in range(4):
        batch.step()
        predictions.append(batch.predicted(part).clone())
    batch.settle()
    distances = [(prediction - part.x).abs().mean().item() for prediction in predictions]
    assert distances[0] > 0.01
    assert distances[-1] < 0.01  # the cosine schedule does not quite end at a clean image


class OutOfMemory(Exception):
    pass


@pytest.mark.parametrize("lanes", LANES[:2])
@pytest.mark.parametrize("kernel", ["materialised_block", "factored_block", "finish"])
def test_a_step_that_fails_changes_nothing(floats: Desk, kernel: str, lanes: Lanes) -> None:
    calls = itertools.count()

    def fails_in_its_second_step(*args: Any) -> Any:
        if next(calls) in first_step:
            return getattr(arithmetic, kernel)(*args)
        raise OutOfMemory

    first_step = range({"finish": 1}.get(kernel, 2 * lanes.count))
    parts = [floats.part(floats.model(mode), LABELS, SEEDS) for mode in SHARED_MODES]
    expected = [floats.alone(part) for part in parts]
    batch = floats.batch(parts, replace(Kernels(lanes=lanes), **{kernel: fails_in_its_second_step}))
    batch.step()
    with pytest.raises(OutOfMemory):
        batch.step()
    batch.settle()
    assert [part.done_steps for part in parts] == [1, 1]
    floats.run(parts, 3)
    assert all(torch.equal(part.x, x) for part, x in zip(parts, expected, strict=True))


def test_a_guidance_scale_of_one_and_no_guidance_are_the_same(floats: Desk) -> None:
    model, scales = floats.model(Mode.FACTORED), (1.0, 1.0 + 1e-12)
    unguided, guided = (floats.part(model, LABELS, SEEDS, guidance_scale=s) for s in scales)
    floats.run([unguided, guided], 4)
    assert torch.equal(unguided.x, guided.x)


# Weights of several models, side by side


Make = Callable[[int], ModelWeights]
"""Maker of another model of some depth."""


class CountedStack(Stack):
    """Knows what was copied to where."""

    def __init__(self, shared: SharedWeights) -> None:
        super().__init__(shared)
        self.copied: list[tuple[int, ModelWeights]] = []

    def _put(self, place: int, model: ModelWeights) -> None:
        self.copied.append((place, model))
        super()._put(place, model)

    def copies_to_place(self, models: Sequence[ModelWeights]) -> int:
        """Also checks that every model's own weights are where it stands."""
        before = len(self.copied)
        placed = self.place(models)
        assert sorted(map(id, placed)) == sorted(map(id, models))
        for layer in range(placed[0].depth):
            count = sum(model.depth > layer for model in placed)
            for kind, weight in enumerate(self.layer(layer, 0, count)):
                for place, model in enumerate(placed[:count]):
                    assert model.materialised is not None
                    assert torch.equal(weight[place], model.materialised[kind][layer])
        return len(self.copied) - before


@pytest.fixture
def stack(floats: Desk) -> CountedStack:
    return CountedStack(floats.shared)


@pytest.fixture
def make(floats: Desk) -> Make:
    seeds = itertools.count()
    return lambda depth: floats.model(Mode.MATERIALISED, depth, next(seeds))


def test_models_keep_their_places(stack: CountedStack, make: Make) -> None:
    a, b, c, d, e = (make(3) for _ in range(5))
    assert stack.copies_to_place([a, b, c, d]) == 4
    assert stack.copies_to_place([d, c, b, a]) == 0
    assert stack.place([c, a, d, b]) == [a, b, c, d]
    assert stack.copies_to_place([a, e, c, d]) == 1
    assert stack.copies_to_place([e, d]) == 1
    assert stack.copies_to_place([d, e]) == 0


def test_the_deepest_come_first(stack: CountedStack, make: Make) -> None:
    shallow, deep, middle = make(2), make(4), make(3)
    assert stack.place([shallow, deep, middle, deep]) == [deep, deep, middle, shallow]
    assert stack.copies_to_place([deep, shallow, deep, middle]) == 0
    assert stack.copies_to_place([deep, middle, shallow]) == 2  # both stand one place further on
    assert stack.copies_to_place([shallow, deep]) == 1


def test_a_model_that_repeats_is_copied_once_for_each_place(
    stack: CountedStack, make: Make
) -> None:
    a, b = make(2), make(2)
    assert stack.copies_to_place([a, a, b, a]) == 4
    assert stack.copies_to_place([a, b, a, a]) == 0
    assert stack.copies_to_place([b, a, b, a]) == 1
    assert stack.copies_to_place([a, a]) == 0


def test_there_is_room_for_more_when_they_come(stack: CountedStack, make: Make) -> None:
    models = [make(2) for _ in range(5)]
    assert stack.nbytes == 0
    assert stack.copies_to_place(models[:2]) == 2
    two = stack.nbytes
    assert stack.copies_to_place(models) == 5
    assert stack.copies_to_place(models[:3]) == 0
    assert stack.nbytes == 4 * two  # doubled, so that it seldom grows
    stack.clear()
    assert stack.nbytes == 0
    assert stack.copies_to_place(models[:2]) == 2


def test_a_model_deeper_than_the_familys_has_room(stack: CountedStack, make: Make) -> None:
    a, b, deep = make(2), make(2), make(6)
    assert stack.copies_to_place([a, b]) == 2
    assert stack.copies_to_place([a, deep]) == 2


def test_places_at_random_hold_the_right_weights(stack: CountedStack, make: Make) -> None:
    generator = random.Random(0)
    models = [make(generator.choice((2, 3, 4))) for _ in range(6)]
    for _ in range(60):
        wanted = generator.choices(models, k=generator.randint(2, 9))
        assert stack.copies_to_place(wanted) <= len(wanted)


def test_composing_the_same_batch_again_copies_nothing(stack: CountedStack, floats: Desk) -> None:
    models = [floats.model(Mode.MATERIALISED, depth, depth) for depth in (4, 3, 3)]
    for order in itertools.permutations(floats.part(model, [0], [1]) for model in models):
        floats.batch(order, stack=stack).settle()
    assert len(stack.copied) == 3


# Sizes


def test_what_a_model_says_that_it_takes_is_what_it_takes(desk: Desk) -> None:
    model = desk.model(Mode.FACTORED, depth=3)
    expected = model.materialised_nbytes
    assert model.nbytes == sum(
        t.untyped_storage().nbytes()
        for t in (model.sigma, model.bias, model.adaln_sigma, model.adaln_bias)
    )
    assert model.materialised is None
    model.materialise()
    assert model.materialised is not None
    assert sum(t.untyped_storage().nbytes() for t in model.materialised) == expected


# Compiled


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method:DeprecationWarning")
@pytest.mark.parametrize("lanes", LANES[:2])
@torch.inference_mode()
def test_compiled_kernels_give_the_same_images(
    desk: Desk, lanes: Lanes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, shared = random.Random(0), desk.shared
    compiled, wanted = CompiledGraphs(tmp_path), graphs(shared.network, shared.dtype)
    for name, value in compiled.environment.items():
        monkeypatch.setenv(name, value)
    for graph in wanted:
        compiled.compile(graph)
    kernels = compiled.load(wanted, lanes)
    sizes = [*itertools.product((2, 7, 24, 48), (2, 3, 4))]
    models = {
        mode: [desk.model(mode, d, seed=r, rank=r) for r, d in sizes] for mode in SHARED_MODES
    }
    every = [*models[Mode.FACTORED], *models[Mode.MATERIALISED]]

    def parts(chosen: Sequence[ModelWeights], images: int, guidance_scale: float) -> list[Part]:
        labels, seeds = [i % 5 for i in range(images)], list(range(images))
        return [
            desk.part(model, labels, seeds, num_inference_steps=2, guidance_scale=guidance_scale)
            for model in chosen
        ]

    batches = [
        parts(chosen, images, guidance_scale)
        for mode in SHARED_MODES
        for chosen in ([models[mode][0]], [models[mode][-1]], models[mode][:3], models[mode])
        for images in (1, 2, 5)
        for guidance_scale in (1.0, 2.0)
    ]
    batches += [
        [desk.random_part(model, generator) for model in generator.sample(every, n)]
        for n in (1, 2, 3, 5, 8, 13)
        for _ in range(3)
    ]
    expected = [[to_pixels(desk.alone(part)).int() for part in batch] for batch in batches]
    alone = [[desk.alone(part, kernels) for part in batch] for batch in batches]
    for batch in batches:
        while unfinished := [part for part in batch if not part.finished]:
            desk.run(unfinished, kernels=kernels)
    for batch, images, compiled_alone in zip(batches, expected, alone, strict=True):
        for part, image, x in zip(batch, images, compiled_alone, strict=True):
            assert torch.equal(part.x, x)
            off = (to_pixels(part.x).int() - image).abs().float()
            assert off.max() <= (1 if shared.compute == torch.float32 else 16), off.max()


# Refined models


def test_a_refined_model_beside_others_is_as_if_alone(floats: Desk) -> None:
    generator, family = random.Random(0), floats.shared.family
    scales = other_scales(family, Size(depth=2, rank=24), 0)
    layers = DenseLayers.of(materialised(family.genes, scales))
    images = floats.alone(floats.part(floats.model(Mode.MATERIALISED), [0, 3], [1, 2]))
    refined = floats.part(ModelWeights.of(floats.shared, layers), [0, 3], [1, 2])
    models = [floats.model(mode, depth, seed=9) for mode in SHARED_MODES for depth in (2, 4)]
    others = [floats.random_part(model, generator) for model in models]
    run_at_random([refined, *others], floats, generator)
    torch.testing.assert_close(refined.x, images)
