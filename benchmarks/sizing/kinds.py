"""Two hundred random budgets over every kind of size: bits, what is shared and what is not.

The family is the chosen form's first seed, with imported layers beside it; its losses are made up,
so that every kind is chosen now and then. Memory is measured as verification does.
"""

import collections
import random

from benchmarks.form import quality
from benchmarks.parts import REPOSITORY, Figures, say
from learngenes.config import DType, Mode, Size, SizeSpace
from learngenes.device import default_device
from learngenes.family.family import Family, load_family, save_family, write_quality
from learngenes.measuring.device import measure_profile
from learngenes.measuring.model import memory
from learngenes.model.dense import materialised
from learngenes.model.factors import DenseLayers
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.quality import QualityTable
from learngenes.sizing.solver import Candidates, Impossible, Infeasible, solve
from worker.build.profiles import process_base_bytes

DIRECTORY = REPOSITORY / "var" / "sizing" / "kinds"
BUDGETS = 200
RATIOS = {DType.FLOAT32: 1.0, DType.BFLOAT16: 1.001, DType.INT8: 1.002, DType.INT4: 1.01}


def measure() -> Figures:
    family = _family()
    profile = measure_profile(family, process_base_bytes(family, DIRECTORY)[0], max_seconds=20)
    chance, over, unmet = random.Random(0), [], 0
    kinds: collections.Counter[str] = collections.Counter()
    shares: list[float] = []
    while sum(kinds.values()) < BUDGETS:
        workload = Workload.of(chance.choice((1, 2, 4, 8)), guidance_scale=chance.choice((1, 2)))
        manifest, table = family.manifest, family.quality
        assert table is not None
        candidates = Candidates.of(manifest.network, manifest.sizes, table, profile, workload)
        budget = Constraints(
            max_mem_bytes=int(10 ** chance.uniform(5.5, 7.5)),
            mode=chance.choice((None, *Mode)),
            dtype=chance.choice((None, *DType)),
        )
        try:
            plan = solve(candidates, budget).plan
        except (Infeasible, Impossible):
            unmet += 1
            continue
        size = Size(depth=plan.depth, rank=plan.rank)
        model = family.assemble(family.own_of(size, plan.mode, plan.dtype), plan.mode, plan.dtype)
        measured = memory(model, manifest.diffusion, workload)
        kinds[f"{plan.mode} {plan.dtype}"] += 1
        assert budget.max_mem_bytes is not None
        shares.append(measured / plan.predicted.memory_bytes)
        if measured > budget.max_mem_bytes:
            over.append({"plan": str(plan), "budget": budget.max_mem_bytes, "measured": measured})
            say("over", **over[-1])
    return {
        "kinds_budgets": BUDGETS,
        "kinds_over": len(over),
        "over": over,
        "refused": unmet,
        "kinds": dict(sorted(kinds.items())),
        "measured_over_predicted": {"least": round(min(shares), 3), "most": round(max(shares), 3)},
    }


def _family() -> Family:
    trained = quality.trained(quality.SEEDS[0])
    ranks = tuple(trained.full_size.rank * share // 8 for share in (1, 2, 4, 8))
    depths = trained.manifest.sizes.depths
    given = trained.manifest.model_dump(exclude={"schema_version", "sha256"})
    given |= {
        "sizes": SizeSpace(depths=depths, ranks=ranks),
        "imported_order": trained.manifest.layer_order,
    }
    layers = DenseLayers.of(materialised(trained.genes, trained.scales))
    parts = trained.genes, trained.stem, trained.depths, trained.limited_data
    save_family(DIRECTORY, given, *parts, imported=layers)
    losses = tuple(tuple(0.2 + 1 / depth + 1 / rank for rank in ranks) for depth in depths)
    table = QualityTable(
        depths=depths,
        ranks=ranks,
        unretrained=losses,
        retrained=losses,
        dtype_loss_ratios={**RATIOS, DType.INT3: 1.02},
        materialised_loss_ratios=RATIOS,
        imported={depth: 0.2 + 1 / depth for depth in depths},
        imported_loss_ratios=RATIOS,
        source="made up",
    )
    write_quality(DIRECTORY, table)
    return load_family(DIRECTORY).to(default_device())
