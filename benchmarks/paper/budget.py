"""Quality at a budget, of memory or of the latency of a batch: the best that each approach gives.

After a minute of preparation. In one process with a thread for each core: nothing else should run.
"""

import copy
import functools
import statistics
import time

import torch
from safetensors.torch import load_file, save_file

from benchmarks.paper.depth import choices
from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import METHODS, scratch, taught_by, train_all
from benchmarks.paper.rows import Row
from benchmarks.paper.training import denoising_loss
from learngenes.config import DType, Mode, Size
from learngenes.family.family import Family
from learngenes.measuring.device import measure_profile
from learngenes.measuring.model import memory, run
from learngenes.model.dense import DenseDiT
from learngenes.model.dit import DiT
from learngenes.model.factors import DenseLayers, Learngenes, Own, Scales
from learngenes.sizing.budget import Constraints, Plan, Workload
from learngenes.sizing.solver import Candidates, Infeasible, solve
from learngenes.training.refine import RefinementConfig, refine
from learngenes.training.retrain import RetrainingConfig, retrain

OURS = "fine"
APPROACHES = (OURS, *METHODS)
BUDGETS = ("memory", "latency")
WORKLOAD = Workload.of(n=4, num_inference_steps=10, guidance_scale=1)
DTYPES = (DType.FLOAT32, DType.BFLOAT16, DType.INT8, DType.INT4)
"""How a rival's layers are stored: rounded as our own are."""
TIMED_STEPS = 8
LATENCY_RUNS = 20
MOST_PLANS = 5
"""Plans for one budget, each for less than the last, which was over it once measured."""
UNTIL_TIME_ENDS = 10**6


def measure(lab: Lab) -> list[Row]:
    """A row for each budget and approach; without FD where nothing fits."""
    budgets, setting = _Budgets(lab), lab.setting
    return [
        budgets.row(of, share, approach, seed)
        for seed in setting.seeds
        for of in BUDGETS
        for share in setting.budget_shares
        for approach in APPROACHES
    ]


class _Budgets:
    def __init__(self, lab: Lab) -> None:
        self.lab, self.setting, self.ancestors = lab, lab.setting, lab.ancestors
        self.diffusion = self.setting.diffusion
        self.whole = self._costs_of(self.setting.network.depth, DType.FLOAT32)

    def row(self, of: str, share: float, approach: str, seed: int) -> Row:
        key = {"table": "budget", "of": of, "share": share, "approach": approach, "seed": seed}
        budget = share * self.whole[of]
        made = self._ours if approach == OURS else functools.partial(self._rival, approach)
        return self.lab.rows.get(key, lambda: {"budget": budget, **made(of, budget, seed)})

    def _rival(self, approach: str, of: str, budget: float, seed: int) -> Row:
        """The one of least loss, on what chooses, that fits."""
        fitting = {
            (depth, dtype): self._loss(approach, depth, dtype, seed)
            for depth in self.setting.budget_depths
            for dtype in DTYPES
            if self._costs_of(depth, dtype)[of] <= budget
        }
        if not fitting:
            return {}
        depth, dtype = min(fitting, key=lambda each: fitting[each])
        judged = self.lab.rows.get(
            {"prepared": approach, "depth": depth, "dtype": dtype, "seed": seed},
            lambda: self.lab.judge(self._stored(approach, depth, dtype, seed)),
        )
        made = {"depth": depth, "dtype": dtype, **self._costs_of(depth, dtype)}
        return {**made, "fd": judged["fd"], "class_accuracy": judged["class_accuracy"]}

    def _costs_of(self, depth: int, dtype: DType) -> Row:
        """Bytes and seconds of layers that share nothing, whatever their weights."""
        model = _stored(scratch(self.ancestors, depth), dtype)
        key = {"costs": "layers", "depth": depth, "dtype": dtype}
        row = self.lab.rows.get(key, lambda: self._costs(model))
        return {of: row[of] for of in BUDGETS}

    def _costs(self, model: DiT) -> Row:
        """Bytes, and the median of a batch's seconds."""
        run(model, self.diffusion, WORKLOAD)
        seconds = (run(model, self.diffusion, WORKLOAD) for _ in range(LATENCY_RUNS))
        bytes_ = memory(model, self.diffusion, WORKLOAD)
        return {"latency": round(statistics.median(seconds), 5), "memory": bytes_}

    def _loss(self, approach: str, depth: int, dtype: DType, seed: int) -> float:
        def loss() -> float:
            return self._choosing_loss(self._stored(approach, depth, dtype, seed))

        key = {"candidate": approach, "depth": depth, "dtype": dtype, "seed": seed}
        return self.lab.outcome(key, loss)

    def _choosing_loss(self, model: DiT | DenseDiT) -> float:
        return denoising_loss(model, self.ancestors.splits.choosing, self.setting)

    def _stored(self, approach: str, depth: int, dtype: DType, seed: int) -> DiT:
        """A rival after its preparation, which is done once and kept."""
        file = self.ancestors.work / "prepared" / f"{approach}-{depth}-{seed}.safetensors"
        torch.manual_seed(seed)
        if not file.exists():
            file.parent.mkdir(exist_ok=True)
            model = METHODS[approach](self.ancestors, depth)
            save_file(self._trained(approach, model, seed).state_dict(), file)
        model = scratch(self.ancestors, depth)
        model.load_state_dict(load_file(file))
        return _stored(model.requires_grad_(False), dtype)

    def _trained(self, approach: str, model: DenseDiT, seed: int) -> DenseDiT:
        """In as many steps as fit, of which some on a copy tell how many; or as it was, if that is
        better by what chooses."""
        choice, teacher = choices(self.lab, approach)["C"], taught_by(self.ancestors, approach)

        def train(model: DenseDiT, steps: int) -> DenseDiT:
            return train_all(
                copy.deepcopy(model),
                self.ancestors,
                steps,
                seed,
                choice.further,
                teacher=teacher,
                distillation=choice.distillation,
            )

        started = time.monotonic()
        train(model, TIMED_STEPS)
        spent = time.monotonic() - started
        left = self.setting.preparation_seconds - spent
        trained = train(model, max(1, int(left / spent * TIMED_STEPS)))
        return min((model, trained), key=self._choosing_loss)

    def _ours(self, of: str, budget: float, seed: int) -> Row:
        """Planned and prepared as by the service, from a family that has shared and own layers."""
        constraint = budget
        for _ in range(MOST_PLANS):
            try:
                plan = self._plan(of, constraint)
            except Infeasible:
                return {}
            own = self._prepared(plan, seed)
            model = self.family.assemble(own, plan.mode, plan.dtype)
            costs = self._costs(model)
            if costs[of] <= budget:
                made = {"depth": plan.depth, "rank": plan.rank, "dtype": plan.dtype}
                return {**made, "mode": plan.mode, **costs, **self.lab.judge(model)}
            constraint *= 0.98 * budget / costs[of]
        return {}

    @functools.cached_property
    def family(self) -> Family:
        return self.ancestors.imported()

    @functools.cached_property
    def _every_plan(self) -> Candidates:
        manifest, quality = self.family.manifest, self.family.quality
        assert quality is not None
        profile = measure_profile(self.family, 0, max_seconds=self.setting.profile_seconds)
        return Candidates.of(manifest.network, manifest.sizes, quality, profile, WORKLOAD)

    def _plan(self, of: str, constraint: float) -> Plan:
        limits = {"memory": {"max_mem_bytes": int(constraint)}}
        chosen = limits.get(of, {"max_latency_seconds": constraint})
        return solve(self._every_plan, Constraints.model_validate(chosen)).plan

    def _prepared(self, plan: Plan, seed: int) -> Own:
        """Sigma for a minute; of written out layers, everything in what is left of it."""
        seconds, size = self.setting.preparation_seconds, Size(depth=plan.depth, rank=plan.rank)
        own = self.family.own_of(size, plan.mode, plan.dtype)
        how = {"mode": plan.mode, "dtype": plan.dtype, "data": self.ancestors.splits.training}
        started = time.monotonic()
        if isinstance(own, Scales) and not self.family.is_prepared(size, plan.mode, plan.dtype):
            brief = RetrainingConfig(max_seconds=seconds, seed=seed)
            own = retrain(self.family, own, brief, **how).scales
        if not plan.mode.written_out:
            return own
        left = max(1.0, seconds - (time.monotonic() - started))
        longer = RefinementConfig(max_seconds=left, patience=UNTIL_TIME_ENDS, seed=seed)
        return refine(self.family, own, longer, **how).layers


def _stored(model: DenseDiT, dtype: DType) -> DiT:
    layers = DenseLayers.of(model.weights())
    return DiT(model.stem, Learngenes(model.config), layers, Mode.MATERIALISED, dtype)
