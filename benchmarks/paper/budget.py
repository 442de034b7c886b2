"""Quality at a budget: the best that each approach gives after a minute of preparation.

In one process with a thread for each core: nothing else should run.
"""

import copy
import time

from torchao.quantization import Int8WeightOnlyConfig, quantize_

from benchmarks.paper.depth import learning_rates
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import pruning, scratch, train_all, written_out
from benchmarks.paper.rows import OURS, Row
from benchmarks.paper.training import denoising_loss
from learngenes.config import DType, Mode, Size
from learngenes.measuring.device import measure_profile
from learngenes.measuring.model import memory, run
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.factors import DenseLayers, Learngenes
from learngenes.sizing.budget import Constraints, Plan, Workload
from learngenes.sizing.solver import Candidates, Infeasible, solve
from learngenes.training.calibrate import calibrate
from learngenes.training.retrain import RetrainingConfig, retrain

APPROACHES = ("fine", "scratch", "pruning", "int8")
WORKLOAD = Workload.of(n=4, num_inference_steps=10, guidance_scale=1)
TIMED_STEPS = 8
LATENCY_RUNS = 20


def measure(lab: Lab) -> list[Row]:
    """A row for each budget and approach; without FD where nothing fits."""
    table = _Budgets(lab)
    return [
        row
        for share in lab.setting.budget_shares
        for row in (table.row(share, approach) for approach in APPROACHES)
    ]


class _Budgets:
    def __init__(self, lab: Lab) -> None:
        self.lab = lab
        self.seconds = lab.setting.preparation_seconds
        self._diffusion = lab.setting.diffusion
        self.family = lab.ancestors.fine("any-size")
        dense = lab.ancestors.dense()
        self.full_bytes = memory(_stored(dense, DType.FLOAT32), lab.setting.diffusion, WORKLOAD)

    def row(self, share: float, approach: str) -> Row:
        budget_bytes = int(self.full_bytes * share)
        key = {"table": "budget", "share": share, "approach": approach}
        return self.lab.rows.get(key, lambda: self._measured(budget_bytes, approach))

    def _measured(self, budget_bytes: int, approach: str) -> Row:
        prepare = {"fine": self._fine, "int8": self._int8}.get(approach)
        if prepare is not None:
            made = prepare(budget_bytes)
        else:
            made = self._trained(approach, budget_bytes)
        if made is None:
            return {"budget_bytes": budget_bytes}
        model, figures = made
        run(model, self._diffusion, WORKLOAD)
        seconds = sorted(run(model, self._diffusion, WORKLOAD) for _ in range(LATENCY_RUNS))
        return {
            "budget_bytes": budget_bytes,
            "memory_bytes": memory(model, self._diffusion, WORKLOAD),
            "latency_seconds": round(seconds[LATENCY_RUNS // 2], 4),
            **figures,
            **self.lab.judge(model),
        }

    def _fine(self, budget_bytes: int) -> tuple[DiT, Row] | None:
        """Model made as by the service: plan, Sigma, and beyond it in what is left of the time."""
        try:
            plan = self._plan(budget_bytes)
        except Infeasible:
            return None
        first, rate = learning_rates(self.lab, OURS)
        started = time.monotonic()
        config = RetrainingConfig(max_seconds=self.seconds, learning_rate=first)
        size = Size(depth=plan.depth, rank=plan.rank)
        scales = retrain(self.family, self.family.scales_of(size), config).scales
        figures: Row = {
            "depth": plan.depth,
            "rank": plan.rank,
            "mode": plan.mode,
            "dtype": plan.dtype,
        }
        if plan.mode is Mode.FACTORED:
            return self.family.assemble(scales, plan.mode, plan.dtype), figures
        model = written_out(self.family, scales)
        left = self.seconds - (time.monotonic() - started)
        return _stored(self._train_for(left, model, rate), plan.dtype), figures

    def _plan(self, budget_bytes: int) -> Plan:
        config = RetrainingConfig(steps=self.lab.setting.calibration_steps)
        quality = calibrate(self.family, config)
        manifest = self.family.manifest
        profile = measure_profile(self.family, 0, max_seconds=self.lab.setting.profile_seconds)
        candidates = Candidates.of(manifest.network, manifest.sizes, quality, profile, WORKLOAD)
        return solve(candidates, Constraints(max_mem_bytes=budget_bytes)).plan

    def _trained(self, approach: str, budget_bytes: int) -> tuple[DiT, Row] | None:
        """The deepest that fits in bfloat16, trained for a minute; in float32 if that fits, too."""
        begin = {"scratch": scratch, "pruning": pruning}[approach]
        for depth in range(self.lab.setting.network.depth, 0, -1):
            model = scratch(self.lab.ancestors, depth)
            for dtype in (DType.FLOAT32, DType.BFLOAT16):
                stored = _stored(model, dtype)
                if memory(stored, self._diffusion, WORKLOAD) <= budget_bytes:
                    model = begin(self.lab.ancestors, depth)
                    rate, _ = learning_rates(self.lab, approach)
                    model = self._train_for(self.seconds, model, rate)
                    return _stored(model, dtype), {"depth": depth, "dtype": dtype}
        return None

    def _int8(self, budget_bytes: int) -> tuple[DenseDiT, Row] | None:
        if memory(_int8(self.lab.ancestors.dense()), self._diffusion, WORKLOAD) > budget_bytes:
            return None
        model = self.lab.ancestors.dense()
        rate, _ = learning_rates(self.lab, "pruning")  # of what it is without a layer to prune
        model = self._train_for(self.seconds, model, rate)
        return _int8(model), {"depth": len(model.layers), "dtype": "int8"}

    def _train_for(self, seconds: float, model: DenseDiT, learning_rate: float) -> DenseDiT:
        """Model trained in as many steps as fit, of which some on a copy tell how many; or as it
        was, if that is better by what chooses."""
        trained = copy.deepcopy(model)
        started = time.monotonic()
        train_all(copy.deepcopy(model), self.lab.ancestors, TIMED_STEPS, 1, learning_rate)
        left = seconds - (time.monotonic() - started)
        each = (time.monotonic() - started) / TIMED_STEPS
        train_all(trained, self.lab.ancestors, max(1, int(left / each)), 0, learning_rate)

        def loss(candidate: DenseDiT) -> float:
            return denoising_loss(candidate, self.lab.ancestors.splits.choosing, self.lab.setting)

        return min((model, trained), key=loss)


def _int8(model: DenseDiT) -> DenseDiT:
    model.requires_grad_(False)
    quantize_(model.layers, Int8WeightOnlyConfig())
    return model


def _stored(model: DenseDiT, dtype: DType) -> DiT:
    layers = DenseLayers.of(model.weights())
    return DiT(model.stem, Learngenes(model.config), layers, Mode.MATERIALISED, dtype)
