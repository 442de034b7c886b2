"""What every table measures with."""

import math
from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.setting import Setting
from learngenes.model.dense import DenseDiT
from learngenes.sizing.cost import BYTES_PER_FLOAT32


@dataclass(frozen=True, eq=False)
class Lab:
    ancestors: Ancestors
    judge: Judge
    rows: Rows

    @property
    def setting(self) -> Setting:
        return self.ancestors.setting

    def judged(
        self, key: Row, model: DenseDiT, judge: Judge | None = None, **figures: float
    ) -> Row:
        """The row with `key`; its bytes are those of the weights written out in float32."""
        parameters = sum(p.numel() for p in model.parameters())
        figures = {**figures, "bytes": parameters * BYTES_PER_FLOAT32}
        return self.rows.get(key, lambda: {**figures, **(judge or self.judge)(model)})

    def outcome(self, key: Row, loss: Callable[[], float]) -> float:
        """The loss of something that is tried once; infinite where it does not train."""

        def tried() -> Row:
            try:
                return {"loss": loss()}
            except FloatingPointError as error:
                return {"diverged": str(error)}

        return float(self.rows.get(key, tried).get("loss", math.inf))
