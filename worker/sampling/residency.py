"""Residency: models, stacks and tables on the engine's device, within a budget of bytes.

A family is there once for each dtype; a model costs its Sigma, and W of each layer where that is
faster and there is room. A refined model has nothing but its W. What was not used for the longest
time goes first.
"""

import functools
import sys
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable

import structlog
import torch
from torch import Tensor

from learngenes.config import DType
from learngenes.family.family import Family
from learngenes.model.factors import DenseLayers, Own
from learngenes.stepping.batch import Stack, Tables
from learngenes.stepping.schedules import COLUMNS, Schedule
from learngenes.stepping.weights import FactoredWeights, ModelWeights, SharedWeights, nbytes
from registry import metrics

log = structlog.get_logger()

FIRST_TABLE_ROWS = 1024
TABLE_SHARE = 8
"""Divisor of the budget: modulations may take one such part."""

Entry = tuple[Hashable, Hashable, int]
"""Key of modulations: (model, schedule, class)."""


class OutOfRoom(Exception):
    """Everything on the device is in use; the request may fit later."""


class ModulationTable:
    """Modulations by (model, schedule, class), as row ranges of one tensor (rows, 6 D)."""

    def __init__(
        self, shared: SharedWeights, max_bytes: int, first_rows: int = FIRST_TABLE_ROWS
    ) -> None:
        """A table begins with `first_rows` and grows."""
        width = 6 * shared.network.width
        self.max_rows = max(1, max_bytes // (width * shared.compute.itemsize))
        rows = min(first_rows, self.max_rows)
        self.rows = torch.zeros(rows, width, dtype=shared.compute, device=shared.device)
        self._at: OrderedDict[Entry, range] = OrderedDict()
        self._users: Counter[Entry] = Counter()

    def take(self, key: Entry, make: Callable[[], Tensor]) -> int:
        """First row of an entry, which stays until it is given back as often as taken.

        Raises OutOfRoom when all other entries are in use, ValueError when it can never fit.
        """
        metrics.LOOKUPS.labels("modulations", "hit" if key in self._at else "miss").inc()
        if key not in self._at:
            content = make()
            place = self._reserve(len(content))
            self.rows[place.start : place.stop] = content
            self._at[key] = place
        self._at.move_to_end(key)
        self._users[key] += 1
        return self._at[key].start

    def give_back(self, key: Entry) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            del self._users[key]

    def forget(self, model_key: Hashable) -> None:
        """Drop the entries of a model that nobody uses any more."""
        for key in [key for key in self._at if key[0] == model_key and key not in self._users]:
            del self._at[key]

    def _reserve(self, length: int) -> range:
        if length > self.max_rows:
            raise ValueError(
                f"{length} rows of modulations are more than the {self.max_rows} there is memory "
                "for; ask for fewer num_inference_steps"
            )
        while (place := self._hole(length)) is None:
            if len(self.rows) < self.max_rows:
                grown = min(self.max_rows, max(2 * len(self.rows), len(self.rows) + length))
                rows = self.rows.new_zeros(grown, self.rows.shape[1])
                rows[: len(self.rows)] = self.rows
                self.rows = rows
                continue
            oldest = next((key for key in self._at if key not in self._users), None)
            if oldest is None:
                raise OutOfRoom("every modulation on the device is in use")
            del self._at[oldest]
            metrics.EVICTIONS.labels("modulations").inc()
        return place

    def _hole(self, length: int) -> range | None:
        start = 0
        for taken in sorted(self._at.values(), key=lambda place: place.start):
            if taken.start - start >= length:
                break
            start = taken.stop
        else:
            if len(self.rows) - start < length:
                return None
        return range(start, start + length)


class CoefficientTable:
    """Coefficients of every schedule that was ever asked for, a few kilobytes each."""

    def __init__(self, device: torch.device) -> None:
        self.rows = torch.zeros(0, len(COLUMNS), device=device)
        self._at: dict[Hashable, int] = {}

    def at(self, key: Hashable, schedule: Schedule) -> int:
        """First row of a schedule's coefficients."""
        if key not in self._at:
            self._at[key] = len(self.rows)
            self.rows = torch.cat([self.rows, schedule.coefficients.to(self.rows.device)])
        return self._at[key]


class Pool:
    """Weights and tables of one family and dtype, shared by requests that can share a batch."""

    def __init__(self, shared: SharedWeights, max_table_bytes: int) -> None:
        self.shared, self.stack = shared, Stack(shared)
        self.modulations = ModulationTable(shared, max_table_bytes)
        self.coefficients = CoefficientTable(shared.device)
        self.models: dict[Hashable, ModelWeights] = {}
        """Weights of models by (model, artifact)."""
        self.used_at = time.monotonic()
        """Time at which a request last asked for it."""
        self.most_rows = sys.maxsize
        """Most rows of a batch; fewer once a batch has failed for want of memory."""

    def drop_materialised(self, key: Hashable) -> None:
        """Drop the W of a model that can write them out again."""
        model = self.models[key]
        if isinstance(model, FactoredWeights) and model.materialised is not None:
            metrics.EVICTIONS.labels("materialised").inc()
            model.materialised = None

    def drop(self, key: Hashable) -> None:
        metrics.EVICTIONS.labels("model").inc()
        del self.models[key]
        self.modulations.forget(key)

    @property
    def tables(self) -> Tables:
        return Tables(self.coefficients.rows, self.modulations.rows)

    @property
    def nbytes(self) -> int:
        models = sum(model.nbytes for model in self.models.values())
        table = nbytes([self.modulations.rows])
        return self.shared.nbytes + table + self.stack.nbytes + models


class Residency:
    def __init__(self, budget_bytes: int) -> None:
        self.budget_bytes = budget_bytes
        self._pools: dict[Hashable, Pool] = {}
        self._uses = 0

    @property
    def nbytes(self) -> int:
        return sum(pool.nbytes for pool in self._pools.values())

    @property
    def pools(self) -> list[Pool]:
        return list(self._pools.values())

    @property
    def models(self) -> int:
        """Number of models on the device."""
        return sum(len(pool.models) for pool in self._pools.values())

    def knows(self, key: Hashable) -> bool:
        """Whether a model is there now. Any thread may ask."""
        return any(key in pool.models for pool in self._pools.values())

    def pool(self, family: Family, dtype: DType, rank: int) -> Pool:
        """Pool of a model; in few bits models share by rank, since groups are those of a prefix."""
        own_rank = None if dtype.bits is None else min(rank, family.full_size.rank)
        key = (family.fingerprint, dtype, own_rank)
        if key not in self._pools:
            shared = SharedWeights(family, dtype, own_rank)
            # another dict, since request threads may be walking this one
            made = Pool(shared, self.budget_bytes // TABLE_SHARE)
            self._pools = {**self._pools, key: made}
        self._pools[key].used_at = time.monotonic()
        return self._pools[key]

    def release(self, unused_since: float) -> list[Pool]:
        """Drop everything of pools that no request has asked for since; returns them."""
        dropped = [pool for pool in self._pools.values() if pool.used_at <= unused_since]
        self._pools = {key: pool for key, pool in self._pools.items() if pool not in dropped}
        return dropped

    def model(
        self,
        pool: Pool,
        key: Hashable,
        load: Callable[[], Own],
        in_use: Collection[ModelWeights],
        *,
        materialise: bool,
    ) -> ModelWeights:
        """Weights of a model, made if they are not there. Raises OutOfRoom, and what `load` raises.

        `materialise` is a wish: the model stays factored where its W do not fit.
        """
        metrics.LOOKUPS.labels("model", "hit" if key in pool.models else "miss").inc()
        if key not in pool.models:
            own = load()
            needed = ModelWeights.bytes_of(pool.shared, own)
            # W have to stand among others', too, but a model that is alone can do without
            twice = isinstance(own, DenseLayers) and self._make_room(2 * needed, in_use)
            if not twice and not self._make_room(needed, in_use):
                raise OutOfRoom("every model on the device is in use; there is no room for another")
            pool.models[key] = ModelWeights.of(pool.shared, own)
        model = pool.models[key]
        self._uses += 1
        model.used_at = self._uses
        if (
            materialise
            and isinstance(model, FactoredWeights)
            and model.materialised is None
            and model not in in_use
        ):
            # once for itself, once for its place among others
            if self._make_room(2 * model.materialised_nbytes, {*in_use, model}, whole=False):
                model.materialise()
            else:
                log.info("no room to materialise", model=str(key), bytes=model.materialised_nbytes)
        return model

    def _make_room(
        self, needed: int, in_use: Collection[ModelWeights], *, whole: bool = True
    ) -> bool:
        """Drop idle models' W, then stacks, then (if `whole`) idle models, until `needed` fits.

        What was used the longest time ago goes first. Nothing is composed when this is called,
        so a stack is only a copy.
        """
        idle = sorted(
            (
                (model.used_at, key, pool)
                for pool in self._pools.values()
                for key, model in pool.models.items()
                if model not in in_use
            ),
            key=lambda entry: entry[0],
        )
        drops: list[Callable[[], None]] = [
            functools.partial(pool.drop_materialised, key) for _, key, pool in idle
        ]
        drops += [pool.stack.clear for pool in self._pools.values()]
        if whole:
            drops += [functools.partial(pool.drop, key) for _, key, pool in idle]
        for drop in drops:
            if self.nbytes + needed <= self.budget_bytes:
                return True
            drop()
        return self.nbytes + needed <= self.budget_bytes
