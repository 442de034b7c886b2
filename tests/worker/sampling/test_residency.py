import random
from collections.abc import Callable, Hashable

import pytest
import torch
from torch import Tensor

from learngenes.config import DiffusionConfig, DType, Mode, Size
from learngenes.family.family import Family
from learngenes.model.dense import materialised
from learngenes.model.factors import DenseLayers, Scales
from learngenes.stepping.schedules import schedule
from learngenes.stepping.weights import ModelWeights, SharedWeights
from tests.support.batches import other_scales, weights
from worker.sampling.residency import CoefficientTable, ModulationTable, OutOfRoom, Pool, Residency

WIDTH = 6 * 32
ROW = 4 * WIDTH
"""Bytes of one row of modulations in float32."""
AMPLE = 50_000_000


@pytest.fixture
def shared(family: Family) -> SharedWeights:
    return SharedWeights(family, DType.FLOAT32)


# Modulations


def rows_of(value: float, count: int) -> Tensor:
    return torch.full((count, WIDTH), float(value))


class Shelf:
    """A modulation table, and what should be in it."""

    def __init__(self, shared: SharedWeights, max_rows: int, first_rows: int = 1024) -> None:
        self.table = ModulationTable(shared, max_rows * ROW, first_rows)
        self.made: list[str] = []

    def take(self, name: str, count: int = 4) -> int:
        """Each entry is as many rows of a number of its own."""

        def make() -> Tensor:
            self.made.append(name)
            return rows_of(ord(name), count)

        at = self.table.take((name, "ddim", 0), make)
        assert torch.equal(self.table.rows[at : at + count], rows_of(ord(name), count))
        return at

    def give_back(self, name: str) -> None:
        self.table.give_back((name, "ddim", 0))

    def holds(self, name: str, at: int, count: int = 4) -> bool:
        return torch.equal(self.table.rows[at : at + count], rows_of(ord(name), count))


def test_what_is_there_is_not_made_again(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    at = shelf.take("a")
    assert shelf.take("b") != at
    assert shelf.take("a") == at
    shelf.give_back("a")
    shelf.give_back("a")
    assert shelf.take("a") == at
    assert shelf.made == ["a", "b"]


def test_models_schedules_and_classes_have_entries_of_their_own(shared: SharedWeights) -> None:
    table = ModulationTable(shared, AMPLE)
    keys = [(m, s, c) for m in ("a", "b") for s in ("ddim", "euler") for c in (0, 1)]
    places = [table.take(key, lambda i=i: rows_of(i, 3)) for i, key in enumerate(keys)]  # type: ignore[misc]
    assert all(torch.equal(table.rows[at : at + 3], rows_of(i, 3)) for i, at in enumerate(places))


def test_the_one_that_was_used_longest_ago_makes_room(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    places = {name: shelf.take(name) for name in "abc"}
    shelf.take("a")
    for name in "aabc":
        shelf.give_back(name)
    assert shelf.take("d") == places["b"]
    assert shelf.holds("a", places["a"])
    assert shelf.holds("c", places["c"])
    shelf.take("a")
    shelf.take("c")
    assert shelf.made == ["a", "b", "c", "d"]


def test_what_is_in_use_stays(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    places = {name: shelf.take(name) for name in "abc"}
    shelf.take("a")
    shelf.give_back("a")  # taken twice, given back once
    with pytest.raises(OutOfRoom, match="in use"):
        shelf.take("d")
    assert all(shelf.holds(name, at) for name, at in places.items())
    shelf.give_back("c")
    assert shelf.take("d") == places["c"]


def test_what_can_never_fit_is_refused(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    at = shelf.take("a")
    shelf.give_back("a")
    with pytest.raises(ValueError, match="fewer num_inference_steps"):
        shelf.take("b", 13)
    assert shelf.holds("a", at)
    assert shelf.take("c", 12) == 0


def test_it_grows_and_keeps_what_it_has(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 40, first_rows=6)
    places = {name: shelf.take(name, 5) for name in "abcdefgh"}
    assert len(shelf.table.rows) == 40
    assert all(shelf.holds(name, at, 5) for name, at in places.items())
    with pytest.raises(OutOfRoom):
        shelf.take("i", 1)


def test_it_grows_by_what_is_needed_at_least(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 1000, first_rows=2)
    shelf.take("a", 2)
    at = shelf.take("b", 500)
    assert shelf.holds("b", at, 500)
    assert 502 <= len(shelf.table.rows) < 1000


def test_holes_are_filled(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 20)
    places = {name: shelf.take(name) for name in "abcde"}
    for name in "bd":
        shelf.give_back(name)
        shelf.table.forget(name)
    assert shelf.take("f", 3) == places["b"]
    assert shelf.take("g") == places["d"]
    assert shelf.take("h", 1) == places["b"] + 3


def test_neighbouring_holes_are_one(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    for name in "abc":
        shelf.take(name)
    shelf.give_back("a")
    shelf.give_back("b")
    assert shelf.take("d", 8) == 0


def test_a_models_entries_are_forgotten_unless_they_are_in_use(shared: SharedWeights) -> None:
    shelf = Shelf(shared, 12)
    places = {name: shelf.take(name) for name in "ab"}
    shelf.give_back("b")
    for name in "ab":
        shelf.table.forget(name)
    assert shelf.holds("a", places["a"])
    assert shelf.take("a") == places["a"]
    shelf.take("b")
    assert shelf.made == ["a", "b", "b"]


def test_whatever_comes_and_goes_nothing_in_use_is_written_over(shared: SharedWeights) -> None:
    generator = random.Random(0)
    shelf = Shelf(shared, 60, first_rows=7)
    sizes = {name: generator.randint(1, 20) for name in "abcdefghijkl"}
    in_use: list[tuple[str, int]] = []
    refused = 0
    for _ in range(600):
        if in_use and generator.random() < 0.5:
            name, _ = in_use.pop(generator.randrange(len(in_use)))
            shelf.give_back(name)
        else:
            name = generator.choice(list(sizes))
            try:
                in_use.append((name, shelf.take(name, sizes[name])))
            except OutOfRoom:
                refused += 1
        assert all(shelf.holds(name, at, sizes[name]) for name, at in in_use)
    assert 0 < refused < 300
    assert len(shelf.table.rows) == 60


# Coefficients


def test_every_schedule_is_there_once() -> None:
    table = CoefficientTable(torch.device("cpu"))
    kinds = [("ddim", 5), ("euler", 5), ("ddim", 9)]
    places = {}
    for name, steps in [*kinds, *kinds]:
        made = schedule(DiffusionConfig(), name, steps)
        at = table.at((name, steps), made)
        assert places.setdefault((name, steps), at) == at
        assert torch.equal(table.rows[at : at + steps], made.coefficients)
    assert len(table.rows) == 19


# Models


def of_model(family: Family, seed: int, depth: int = 2, rank: int = 24) -> Callable[[], Scales]:
    return lambda: other_scales(family, Size(depth=depth, rank=rank), seed)


def untouched() -> Scales:
    raise AssertionError("it is there already")


def add(
    residency: Residency,
    pool: Pool,
    key: Hashable,
    *in_use: ModelWeights,
    materialise: bool = False,
) -> ModelWeights:
    load = of_model(pool.shared.family, 0)
    return residency.model(pool, key, load, in_use, materialise=materialise)


@pytest.fixture
def one(shared: SharedWeights) -> ModelWeights:
    return weights(shared, of_model(shared.family, 0)(), Mode.FACTORED)


def roomy_for(family: Family, extra: int) -> tuple[Residency, Pool]:
    """A residency with one pool in float32 and `extra` bytes for models."""
    residency = Residency(AMPLE)
    pool = residency.pool(family, DType.FLOAT32, 24)
    residency.budget_bytes = residency.nbytes + extra
    return residency, pool


def test_a_family_is_there_once_for_each_dtype(family: Family) -> None:
    residency = Residency(AMPLE)
    pools = {
        (dtype, rank): residency.pool(family, dtype, rank) for dtype in DType for rank in (8, 24)
    }
    assert pools[DType.FLOAT32, 8] is pools[DType.FLOAT32, 24]
    assert pools[DType.BFLOAT16, 8] is pools[DType.BFLOAT16, 24]
    assert pools[DType.INT8, 8] is not pools[DType.INT8, 24]  # its scales are of a rank
    assert residency.pool(family, DType.INT8, 24) is pools[DType.INT8, 24]
    assert len(set(pools.values())) == 2 + 2 * len([d for d in DType if d.bits is not None])
    assert residency.nbytes == sum(pool.nbytes for pool in set(pools.values()))


class AskedMeanwhile:
    """A model's key; while it is looked for, a pool arrives."""

    def __init__(self, arrive: Callable[[], object]) -> None:
        self._arrive = arrive

    def __hash__(self) -> int:
        self._arrive()
        return 0


def test_what_arrives_does_not_disturb_who_asks_what_is_there(family: Family) -> None:
    residency = Residency(AMPLE)
    residency.pool(family, DType.FLOAT32, 24)
    residency.pool(family, DType.BFLOAT16, 24)
    ranks = iter((8, 24))
    key = AskedMeanwhile(lambda: residency.pool(family, DType.INT8, next(ranks)))
    assert not residency.knows(key)
    assert next(ranks, None) is None, "both arrived while it was looked for"


def test_a_model_is_made_once(family: Family) -> None:
    residency, pool = roomy_for(family, AMPLE)
    assert not residency.knows(("m", 0))
    before = residency.nbytes
    model = residency.model(pool, ("m", 0), of_model(family, 0), (), materialise=False)
    assert residency.knows(("m", 0))
    assert not residency.knows(("m", 1))
    assert residency.model(pool, ("m", 0), untouched, (), materialise=False) is model
    assert residency.nbytes == before + model.nbytes


def test_w_is_written_out_where_there_is_room_for_it_twice(
    family: Family, one: ModelWeights
) -> None:
    """Once for itself and once for its place in a stack."""
    needed = one.nbytes + 2 * one.materialised_nbytes
    for short, written_out in ((0, True), (one.nbytes + 1, False)):
        residency, pool = roomy_for(family, needed - short)
        model = residency.model(pool, "m", of_model(family, 0), (), materialise=True)
        assert (model.materialised is not None) is written_out


def test_a_model_in_use_is_not_written_out_under_those_who_use_it(family: Family) -> None:
    residency, pool = roomy_for(family, AMPLE)
    model = add(residency, pool, "m")
    add(residency, pool, "m", model, materialise=True)
    assert model.materialised is None
    add(residency, pool, "m", materialise=True)
    assert model.materialised is not None


def test_the_model_that_was_used_longest_ago_goes_first(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, 3 * one.nbytes)
    for key in "abcab":
        add(residency, pool, key)
    add(residency, pool, "d")
    assert [key for key in "abcd" if residency.knows(key)] == ["a", "b", "d"]
    assert residency.nbytes <= residency.budget_bytes


def test_a_model_in_use_stays(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, 2 * one.nbytes)
    a = add(residency, pool, "a")
    add(residency, pool, "b")
    add(residency, pool, "c", a)
    assert [key for key in "abc" if residency.knows(key)] == ["a", "c"]


def test_there_is_no_room_where_every_model_is_in_use(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, 2 * one.nbytes)
    in_use = [add(residency, pool, key) for key in "ab"]
    with pytest.raises(OutOfRoom, match="in use"):
        add(residency, pool, "c", *in_use)
    assert [key for key in "abc" if residency.knows(key)] == ["a", "b"]


def test_idle_models_lose_their_w_before_any_goes(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, 3 * one.nbytes + 3 * one.materialised_nbytes)
    a, b = (add(residency, pool, key, materialise=True) for key in "ab")
    assert a.materialised is not None
    assert b.materialised is not None
    c = add(residency, pool, "c", materialise=True)
    assert [key for key in "abc" if residency.knows(key)] == ["a", "b", "c"]
    assert [model.materialised is not None for model in (a, b, c)] == [False, True, True]


def test_w_of_a_model_in_use_stays(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, 3 * one.nbytes + 3 * one.materialised_nbytes)
    a = add(residency, pool, "a", materialise=True)
    b = add(residency, pool, "b", a, materialise=True)
    c = add(residency, pool, "c", a, materialise=True)
    assert [model.materialised is not None for model in (a, b, c)] == [True, False, True]


def test_w_that_is_written_out_again_is_the_same(family: Family) -> None:
    residency, pool = roomy_for(family, AMPLE)
    model = add(residency, pool, "m", materialise=True)
    assert model.materialised is not None
    before = [weight.clone() for weight in model.materialised]
    model.materialised = None
    add(residency, pool, "m", materialise=True)
    assert all(map(torch.equal, before, model.materialised))


def test_a_refined_model_keeps_its_w_or_goes(family: Family) -> None:
    scales = of_model(family, 0)()
    refined = DenseLayers.of(materialised(family.genes, scales))
    residency, pool = roomy_for(family, AMPLE)
    model = residency.model(pool, "r", lambda: refined, (), materialise=True)
    assert model.materialised is not None
    written_out = sum(tensor.numel() * 4 for tensor in refined.stacked().values())
    assert model.nbytes == written_out
    residency.budget_bytes = residency.nbytes
    add(residency, pool, "a")
    assert [key for key in "ra" if residency.knows(key)] == ["a"]
    assert model.materialised is not None


def test_an_evicted_models_modulations_go_with_it(family: Family, one: ModelWeights) -> None:
    residency, pool = roomy_for(family, one.nbytes)
    add(residency, pool, "a")
    pool.modulations.take(("a", "ddim", 0), lambda: rows_of(1, 4))
    pool.modulations.give_back(("a", "ddim", 0))
    add(residency, pool, "b")
    add(residency, pool, "a")
    at = pool.modulations.take(("a", "ddim", 0), lambda: rows_of(2, 4))
    assert torch.equal(pool.modulations.rows[at : at + 4], rows_of(2, 4))


def test_what_cannot_be_loaded_leaves_nothing_behind(family: Family) -> None:
    def lost() -> Scales:
        raise FileNotFoundError("it was deleted")

    residency, pool = roomy_for(family, AMPLE)
    before = residency.nbytes
    with pytest.raises(FileNotFoundError, match="deleted"):
        residency.model(pool, "m", lost, (), materialise=True)
    assert not residency.knows("m")
    assert residency.nbytes == before
    assert residency.model(pool, "m", of_model(family, 0), (), materialise=False).depth == 2


def test_models_stay_within_the_budget_whatever_comes(family: Family, one: ModelWeights) -> None:
    generator = random.Random(0)
    residency = Residency(AMPLE)
    pools = [residency.pool(family, dtype, 24) for dtype in (DType.FLOAT32, DType.BFLOAT16)]
    residency.budget_bytes = residency.nbytes + 4 * one.nbytes + 5 * one.materialised_nbytes
    in_use: list[ModelWeights] = []
    for _ in range(150):
        pool = generator.choice(pools)
        key = (pool.shared.dtype, generator.randrange(8))
        try:
            model = residency.model(
                pool, key, of_model(family, key[1]), in_use, materialise=generator.random() < 0.5
            )
        except OutOfRoom:
            in_use = in_use[2:]
            continue
        in_use = generator.sample([*in_use, model], generator.randint(0, min(3, len(in_use) + 1)))
        assert residency.nbytes <= residency.budget_bytes
        held = {id(model) for pool in pools for model in pool.models.values()}
        assert held.issuperset(id(model) for model in in_use)


def test_a_model_without_room_for_its_w_stays_all_the_same(
    family: Family, one: ModelWeights
) -> None:
    residency, pool = roomy_for(family, 2 * one.nbytes)
    add(residency, pool, "a")
    model = add(residency, pool, "b", materialise=True)
    assert model.materialised is None
    assert [key for key in "ab" if residency.knows(key)] == ["a", "b"]


def test_the_oldest_of_all_dtypes_goes_first(family: Family, one: ModelWeights) -> None:
    residency = Residency(AMPLE)
    first, second = (residency.pool(family, dtype, 24) for dtype in (DType.FLOAT32, DType.BFLOAT16))
    residency.budget_bytes = residency.nbytes + 2 * one.nbytes
    add(residency, second, "old")
    add(residency, first, "new")
    add(residency, first, "newest")
    assert [key for key in ("old", "new", "newest") if residency.knows(key)] == ["new", "newest"]
