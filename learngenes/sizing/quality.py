"""Quality of a size: a family's measured losses, interpolated so that more is never worse."""

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from learngenes.config import Ascending, DType, Frozen, Mode

Row = tuple[PositiveFloat, ...]
Floats = NDArray[np.float64]


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

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for table in (self.unretrained, self.retrained):
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
        return self.model_copy(update={"imported": {}, "imported_loss_ratios": {}})

    @property
    def imported_alone(self) -> Self:
        """This table without sizes that share U and V."""
        nothing = dict.fromkeys(("depths", "ranks", "unretrained", "retrained"), ())
        unknown: dict[str, object] = {"dtype_loss_ratios": {}, "materialised_loss_ratios": {}}
        return self.model_copy(update={**nothing, **unknown})

    def qualities(self, depths: Floats, ranks: Floats, loss_ratios: Floats) -> Floats:
        """Qualities of many sizes at once, in (0, 1]: the family's best loss over theirs.

        Between the points of the grid the loss is bilinear in depth and log rank, after each
        was replaced by the least loss of any size that is no larger. Outside, the edge holds.
        """
        if not self.depths:
            return np.zeros(len(depths))
        losses = self._falling
        by_rank = np.stack(
            [np.interp(np.log(ranks), np.log(self.ranks), row) for row in losses]
        )  # (grid depths, sizes)
        position = np.interp(depths, self.depths, np.arange(len(self.depths)))
        low = position.astype(int)
        high = np.minimum(low + 1, len(self.depths) - 1)
        columns = np.arange(len(depths))
        weight = position - low
        below = by_rank[low, columns]
        loss = below + (by_rank[high, columns] - below) * weight  # exact where it is flat
        return self._best / np.asarray(loss * np.maximum(1, loss_ratios))

    def imported_qualities(self, depths: Floats, loss_ratio: float) -> Floats:
        """The same of sizes in mode dense, between the depths that were measured."""
        if not (known := sorted(self.imported)):
            return np.zeros(len(depths))
        falling = np.minimum.accumulate([self.imported[depth] for depth in known])
        loss = np.interp(depths, known, falling)
        return self._best / np.asarray(loss * np.maximum(1, loss_ratio))

    @property
    def _falling(self) -> Floats:
        """Least loss of any size that is no larger."""
        losses = np.array(self.retrained)
        return np.minimum.accumulate(np.minimum.accumulate(losses, axis=0), axis=1)

    @property
    def _best(self) -> float:
        shared = [float(self._falling[-1, -1])] if self.depths else []
        return min([*shared, *self.imported.values()])
