"""Table 1: models of several depths, by every method."""

import time
from dataclasses import dataclass

from benchmarks.paper.ancestors import Ancestors
from benchmarks.paper.judge import Judge
from benchmarks.paper.methods import FINE, first_stage, second_stage
from benchmarks.paper.rows import Row, Rows
from benchmarks.paper.training import denoising_loss
from learngenes.dense import DenseDiT


@dataclass(frozen=True)
class DepthTable:
    ancestors: Ancestors
    judge: Judge
    rows: Rows

    def learning_rates(self, method: str) -> tuple[float, float]:
        """Of stage A and stage B: the best of a search on what chooses."""
        setting = self.ancestors.setting
        everything = setting.learning_rates
        if method not in FINE:
            best = min(everything, key=lambda rate: self._searched(method, rate, rate))
            return best, best
        first = min(
            setting.sigma_learning_rates, key=lambda rate: self._searched(method, rate, None)
        )
        return first, min(everything, key=lambda rate: self._searched(method, first, rate))

    def _searched(self, method: str, first: float, second: float | None) -> float:
        def measure() -> Row:
            setting = self.ancestors.setting
            model = first_stage(self.ancestors, method, setting.searched_depth, 0, first)
            if second is not None:
                model = second_stage(self.ancestors, model, 0, second)
            return {"loss": denoising_loss(model, self.ancestors.splits.choosing, setting)}

        return float(self.rows.get({"search": method, "A": first, "B": second}, measure)["loss"])

    def measure(self, method: str, depth: int, seed: int) -> list[Row]:
        """Two rows, after stages A and B."""
        keys = [{"method": method, "depth": depth, "seed": seed, "stage": stage} for stage in "AB"]
        if not all(self.rows.has(key) for key in keys):
            first, second = self.learning_rates(method)
            started = time.monotonic()
            model = first_stage(self.ancestors, method, depth, seed, first)
            seconds = time.monotonic() - started
            self._judge(keys[0], model, first, seconds)
            started = time.monotonic()
            model = second_stage(self.ancestors, model, seed, second)
            self._judge(keys[1], model, second, seconds + time.monotonic() - started)
        return [self.rows.get(key, dict) for key in keys]

    def _judge(self, key: Row, model: DenseDiT, rate: float, seconds: float) -> None:
        figures = {"learning_rate": rate, "seconds": round(seconds, 1)}
        self.rows.get(key, lambda: {**figures, **self.judge(model)})
