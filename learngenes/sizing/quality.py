"""Quality of a size: a family's measured losses, interpolated so that more is never worse."""

import math
from typing import Self

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, PositiveFloat, model_validator

from learngenes.config import Ascending, DType, Frozen, Mode

Row = tuple[PositiveFloat, ...]
Floats = NDArray[np.float64]


class QualityTable(Frozen):
    """Held-out denoising losses over a grid of depth x rank, lower is better."""

    depths: Ascending
    ranks: Ascending
    unretrained: tuple[Row, ...]
    """One row per depth, one column per rank."""
    retrained: tuple[Row, ...]
    """The same after Sigma retraining; the solver uses these."""
    dtype_loss_ratios: dict[DType, PositiveFloat]
    """Ratio of the loss with matrices stored in a dtype, U and V where it is few bits, to that in
    float32."""
    materialised_loss_ratios: dict[DType, PositiveFloat] = Field(default_factory=dict)
    """The same with W stored in few bits; none in older families, which then have no such sizes."""
    source: str
    """Note on how it was measured, or that it was not."""

    @model_validator(mode="after")
    def _rectangular(self) -> Self:
        for table in (self.unretrained, self.retrained):
            if [len(row) for row in table] != [len(self.ranks)] * len(self.depths):
                raise ValueError(
                    f"a table must have {len(self.depths)} rows of {len(self.ranks)} losses"
                )
        if DType.FLOAT32 not in self.dtype_loss_ratios:
            raise ValueError("dtype_loss_ratios must have float32")
        return self

    def loss_ratio(self, mode: Mode, dtype: DType) -> float:
        """Loss in an execution, over that in float32; infinite where nobody has measured it."""
        rounded = mode is Mode.MATERIALISED and dtype.bits is not None
        ratios = self.materialised_loss_ratios if rounded else self.dtype_loss_ratios
        return ratios.get(dtype, math.inf)

    def qualities(self, depths: Floats, ranks: Floats, loss_ratios: Floats) -> Floats:
        """Qualities of many sizes at once, in (0, 1]: the family's best loss over theirs.

        Between the points of the grid the loss is bilinear in depth and log rank, after each
        was replaced by the least loss of any size that is no larger. Outside, the edge holds.
        """
        losses = np.array(self.retrained)
        losses = np.minimum.accumulate(np.minimum.accumulate(losses, axis=0), axis=1)
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
        return np.asarray(losses[-1, -1] / (loss * np.maximum(1, loss_ratios)))
