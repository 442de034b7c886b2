"""Quality of a size and a sampling: a family's measured tables, in which more is never worse."""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt, model_validator

from learngenes.config import (
    Ascending,
    DType,
    Frozen,
    Mode,
    Sampling,
    SamplingRequest,
    Scheduler,
    Share,
)

Row = tuple[PositiveFloat, ...]
Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DEFAULT_SAMPLING = Sampling(
    num_inference_steps=10,
    scheduler=Scheduler.DPMSOLVER,
    guidance_scale=2,
    guidance_start=0.2,
    guidance_stop=0.8,
)
"""Sampling where nothing is known of a family's pictures."""
TASK_SAMPLING = DEFAULT_SAMPLING.model_copy(
    update={"guidance_scale": 3.0, "guidance_start": 0.0, "guidance_stop": 1.0}
)
"""Sampling for the classes of a task, which are learned in a minute. Of 600 pictures of the three
drawn shapes of `benchmarks/start/task.py` the asked one was found in 95 %, and in 86 % where only
the middle steps were guided."""
LEAST_QUALITY = 1e-6
"""Quality of pictures that are no better than the worst that were measured."""


class PictureTable(Frozen):
    """What the pictures of one sampling are worth, over the grid of a QualityTable."""

    sampling: Sampling
    distances: tuple[Row, ...]
    """Fréchet distances to real images; one row per depth, one column per rank."""
    accuracies: tuple[tuple[Share, ...], ...]
    """Share of the pictures in which a classifier finds the class that was asked for."""


class Pictures(Frozen):
    """What pictures are worth, by sampling."""

    floor: PositiveFloat
    """Distance of real images that were held out."""
    count: PositiveInt
    """Number of pictures, and of real images, of which each distance is."""
    tables: Annotated[tuple[PictureTable, ...], Field(min_length=1)]
    heldout_error: NonNegativeFloat
    """Median of |predicted / measured - 1| of the distances of sizes that no table has."""
    source: str
    """Note on how it was measured."""
    accuracy_of_real: Share = 1.0
    """Share of the real images in which that classifier finds their class."""

    @property
    def worst(self) -> float:
        """Distance that has quality 0: the smallest size's by the sampling that is worst for it."""
        return max(table.distances[0][0] for table in self.tables)

    def at(self, sampling: Sampling) -> tuple[Floats, Floats] | None:
        """Distances and accuracies over the grid; None where the sampling was not measured.

        Between two measured numbers of steps they are linear in the logarithm of it.
        """
        between = self._between(sampling)
        if between is None:
            return None
        below, above, weight = between
        values = np.array([below.distances, below.accuracies])
        if weight:
            values += weight * (np.array([above.distances, above.accuracies]) - values)
        return values[0], values[1]

    def knows(self, sampling: Sampling) -> bool:
        """Whether the sampling was measured, or lies between two that were."""
        return self._between(sampling) is not None

    def _between(self, sampling: Sampling) -> tuple[PictureTable, PictureTable, float] | None:
        """The tables of the next fewer and more steps, and the share of the way to the latter."""
        alike = self._by_steps.get(_but_for_steps(sampling), {})
        steps, known = sampling.num_inference_steps, sorted(alike)
        if not known or not known[0] <= steps <= known[-1]:
            return None
        low, high = max(n for n in known if n <= steps), min(n for n in known if n >= steps)
        weight = math.log(steps / low) / math.log(high / low) if high > low else 0.0
        return alike[low], alike[high], weight

    @functools.cached_property
    def _by_steps(self) -> dict[Sampling, dict[int, PictureTable]]:
        """The tables by sampling but for its steps, then by steps."""
        found: dict[Sampling, dict[int, PictureTable]] = {}
        for table in self.tables:
            alike = found.setdefault(_but_for_steps(table.sampling), {})
            alike[table.sampling.num_inference_steps] = table
        return found


def _but_for_steps(sampling: Sampling) -> Sampling:
    return sampling.model_copy(update={"num_inference_steps": 1})


class QualityTable(Frozen):
    """Held-out denoising losses over a grid of depth x rank, lower is better.

    The grid is empty while a family has nothing but the layers of the DiT that it was made from.
    """

    depths: Ascending | tuple[()]
    ranks: Ascending | tuple[()]
    unretrained: tuple[Row, ...]
    """One row per depth, one column per rank."""
    retrained: tuple[Row, ...]
    """The same after Sigma retraining; the solver uses these."""
    dtype_loss_ratios: dict[DType, PositiveFloat]
    """Ratio of the loss with matrices stored in a dtype, U and V where it is few bits, to that in
    float32."""
    materialised_loss_ratios: dict[DType, PositiveFloat] = Field(default_factory=dict)
    """The same with W stored in few bits; none in older families, which then have no such sizes."""
    imported: dict[PositiveInt, PositiveFloat] = Field(default_factory=dict)
    """Loss by depth of sizes in mode dense, trained as a build does; none without an import."""
    imported_loss_ratios: dict[DType, PositiveFloat] = Field(default_factory=dict)
    """Ratio of an imported model's loss in a dtype to that in float32."""
    source: str
    """Note on how it was measured, or that it was not."""
    pictures: Pictures | None = None
    """What pictures are worth; None until that is measured, and quality is then by loss."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        pictures = self.pictures.tables if self.pictures else ()
        of_pictures = ((table.distances, table.accuracies) for table in pictures)
        for table in (self.unretrained, self.retrained, *itertools.chain(*of_pictures)):
            if [len(row) for row in table] != [len(self.ranks)] * len(self.depths):
                raise ValueError(
                    f"a table must have {len(self.depths)} rows of {len(self.ranks)} losses"
                )
        if not self.depths and not self.imported:
            raise ValueError("there must be a loss of some size")
        if DType.FLOAT32 not in (self.dtype_loss_ratios or self.imported_loss_ratios):
            raise ValueError("dtype_loss_ratios must have float32")
        return self

    def loss_ratio(self, mode: Mode, dtype: DType) -> float:
        """Loss in an execution, over that in float32; infinite where nobody has measured it."""
        rounded = mode is Mode.MATERIALISED and dtype.bits is not None
        ratios = self.materialised_loss_ratios if rounded else self.dtype_loss_ratios
        if mode is Mode.DENSE:
            ratios = self.imported_loss_ratios
        return ratios.get(dtype, math.inf)

    @property
    def shared_alone(self) -> Self:
        """This table without sizes of imported layers."""
        nothing: dict[str, object] = {"imported": {}, "imported_loss_ratios": {}}
        return self.model_copy(update=nothing)

    @property
    def of_other_classes(self) -> Self:
        """This table for another data set, of whose pictures it says nothing."""
        return self.shared_alone.model_copy(update={"pictures": None})

    @property
    def imported_alone(self) -> Self:
        """This table without sizes that share U and V."""
        nothing = dict.fromkeys(("depths", "ranks", "unretrained", "retrained"), ())
        unknown: dict[str, object] = {"dtype_loss_ratios": {}, "materialised_loss_ratios": {}}
        return self.model_copy(update={**nothing, **unknown, "pictures": None})

    def choices(
        self, asked: SamplingRequest, num_classes: int | None = None
    ) -> tuple[Self, tuple[Sampling, ...]]:
        """Table and samplings that a model is planned by; `num_classes`: of a task."""
        if num_classes is None:
            return self, self.samplings(asked)
        other = self.of_other_classes
        return other, other.samplings(asked, TASK_SAMPLING)

    def samplings(
        self, asked: SamplingRequest, unmeasured: Sampling = DEFAULT_SAMPLING
    ) -> tuple[Sampling, ...]:
        """Samplings among which a plan chooses: all that were measured, as far as a caller leaves
        it open; `unmeasured` where none was.
        """
        tables = () if self.pictures is None else self.pictures.tables
        wanted = dict.fromkeys(asked.over(table.sampling) for table in tables)
        known = tuple(s for s in wanted if self.pictures and self.pictures.knows(s))
        return known or (asked.over(unmeasured),)

    def losses(self, depths: Ints, ranks: Ints) -> Floats:
        """Losses of many sizes at once, in float32."""
        return self._between(np.array(self.retrained), depths, ranks)

    def qualities(self, losses: Floats) -> Floats:
        """Qualities by loss alone, in (0, 1]: the family's best loss over these."""
        return np.asarray(self._best / losses)

    def distances(
        self, samplings: Sequence[Sampling], depths: Ints, ranks: Ints
    ) -> tuple[Floats, Floats] | None:
        """Distances and class accuracies (S, N) of N sizes; None where some are not known."""
        measured = [self.pictures.at(each) if self.pictures else None for each in samplings]
        known = [tables for tables in measured if tables is not None]
        if len(known) < len(measured):
            return None
        distances, accuracies = map(np.array, zip(*known, strict=True))
        worse = -self._between(-accuracies, depths, ranks)
        return self._between(distances, depths, ranks), worse

    def pictures_of_loss(self, sampling: Sampling) -> tuple[Floats, Floats, Floats]:
        """Ascending losses, with the distances and class accuracies that sizes of these losses
        have by and large: rounding is judged by what lies between.
        """
        assert self.pictures is not None
        measured = self.pictures.at(sampling)
        assert measured is not None
        distances, accuracies = measured
        falling = _falling(np.array(self.retrained)), _falling(distances), _falling(-accuracies)
        known, distance, wrong = (table.ravel() for table in falling)
        order = np.argsort(known)
        rising = np.maximum.accumulate
        return known[order], rising(distance[order]), -rising(wrong[order])

    def picture_qualities(self, distances: Floats, accuracies: Floats) -> Floats:
        """Share of the way from the worst pictures to real ones, in (0, 1], of those pictures that
        show what was asked for: counted as if real images always did.
        """
        assert self.pictures is not None
        worst, floor = self.pictures.worst, self.pictures.floor
        shown = np.minimum(accuracies / self.pictures.accuracy_of_real, 1)
        way = (worst - distances) / max(worst - floor, 1e-9)
        return np.clip(way * shown, LEAST_QUALITY, 1)

    def _between(self, table: Floats, depths: Ints, ranks: Ints) -> Floats:
        """Values (…, N) of N sizes, of a table (…, depths, ranks) or of several.

        Between the points of the grid they are bilinear in depth and log rank, after each was
        replaced by the least of any size that is no larger. Outside, the edge holds.
        """
        falling = _falling(table)
        low, high, weight = _between_points(np.log(ranks), np.log(self.ranks))
        shallow, deep, along = _between_points(depths, np.array(self.depths))

        def at(row: Ints) -> Floats:
            below = falling[..., row, low]
            return np.asarray(below + (falling[..., row, high] - below) * weight)

        below = at(shallow)
        return np.asarray(below + (at(deep) - below) * along)  # exact where flat

    def imported_losses(self, depths: Ints) -> Floats:
        """Losses of sizes in mode dense, between the depths that were measured."""
        known = sorted(self.imported)
        falling = np.minimum.accumulate([self.imported[depth] for depth in known])
        return np.interp(depths, known, falling)

    @property
    def _best(self) -> float:
        shared = [float(_falling(np.array(self.retrained))[-1, -1])] if self.depths else []
        return min([*shared, *self.imported.values()], default=0.0)


def _falling(table: Floats) -> Floats:
    """Least value of any size that is no larger; of a table (…, depths, ranks) or of several."""
    return np.minimum.accumulate(np.minimum.accumulate(table, axis=-2), axis=-1)


def _between_points(values: Floats | Ints, points: Floats | Ints) -> tuple[Ints, Ints, Floats]:
    """The points below and above each value, by index, and its share of the way; edges hold."""
    position = np.interp(values, points, np.arange(len(points)))
    low = position.astype(int)
    return low, np.minimum(low + 1, len(points) - 1), position - low
