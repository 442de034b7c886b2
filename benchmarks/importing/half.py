"""The dense ancestor of the paper's tables, imported; half its layers, after five minutes more.

Beside it: pruned to the same depth, greedily by what chooses, and everything fine-tuned on the data
for as long, by AdamW at the best of several learning rates, as the paper's tables have it, and by
the optimiser of a build.
"""

import json
import time
from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from benchmarks.form import quality
from benchmarks.paper.methods import pruned
from benchmarks.paper.setting import FASHION
from benchmarks.paper.training import denoising_loss
from benchmarks.parts import REPOSITORY, Figures, say
from learngenes.config import DType, Mode, Size
from learngenes.device import training_precision
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT
from learngenes.model.factors import DenseLayers
from learngenes.training.condense import condense
from learngenes.training.refine import RefinementConfig, optimizer_of, refine
from learngenes.training.tuning import Tuned, Tuning

WORK = REPOSITORY / "var" / "importing"
SECONDS = 300.0
LEARNING_RATES = (1e-3, 3e-3)
"""AdamW's, for the rival, which has the best of all ways; ours is trained as in a build."""
CONFIG = """
name = "imported"
rank = {rank}
[data]
path = "{path}"
class_names = {class_names}
licence = "{licence}"
[sizes]
depths = [2, 4, 6, 8, 10, 12]
ranks = [{rank}]
[training]
steps = 1
"""


def measure() -> Figures:
    WORK.mkdir(parents=True, exist_ok=True)
    ancestors = quality.lab().ancestors
    dense = ancestors.dense()
    teacher = ancestors.exported()
    started = time.monotonic()
    family = condense(
        str(teacher), _config(dense), WORK / "work", WORK / "family", import_only=True
    )
    seconds = time.monotonic() - started
    full, half = family.full_size.depth, family.full_size.depth // 2
    difference = _difference(family, teacher)
    say("imported", seconds=round(seconds), difference=difference)
    own = family.own_of(Size(depth=half, rank=dense.config.width), Mode.DENSE, DType.FLOAT32)
    brief = RefinementConfig(max_seconds=SECONDS, patience=10**6)
    begun = _network(family, own)
    refined = refine(family, own, brief, data=ancestors.splits.training, mode=Mode.DENSE)
    models = {
        f"imported, L{full}": _network(family, family.full_own(Mode.DENSE)),
        f"imported, L{half}, as left": begun,
        f"imported, L{half}": _network(family, refined.layers),
    }
    models[f"imported, L{half}, not taught"] = _alone(family, own)
    for rate in LEARNING_RATES:
        models[f"pruned, L{half}, AdamW at {rate}"] = _pruned(family, half, rate)
    models[f"pruned, L{half}, as in a build"] = _pruned(family, half, None)
    judged = {name: _judged(model) for name, model in models.items()}
    ours = judged[f"imported, L{half}"]["fd"]
    theirs = min(f["fd"] for name, f in judged.items() if name.startswith("pruned"))
    return {
        "import_full_max_abs_diff": difference,
        "import_seconds": round(seconds),
        "half_depth_fd_over_pruned": round(ours / theirs, 4),
        "seconds_more": SECONDS,
        "refining_steps": refined.steps,
        "layer_order": family.manifest.imported_order,
        "quality": json.loads(family.quality.model_dump_json()) if family.quality else None,
        "judged": judged,
    }


def _config(dense: DenseDiT) -> Path:
    file = WORK / "config.toml"
    names = json.dumps(list(FASHION.class_names))
    rank = 8 * dense.config.width
    file.write_text(
        CONFIG.format(rank=rank, path=FASHION.path, class_names=names, licence=FASHION.licence)
    )
    return file


@torch.no_grad()
def _difference(family: Family, teacher: Path) -> float:
    """Largest difference of a prediction from diffusers', the classes' and without any."""
    theirs = DiTTransformer2DModel.from_pretrained(teacher, subfolder="transformer").eval()
    network, generator = family.manifest.network, torch.Generator().manual_seed(0)
    side = network.sample_size
    x = torch.randn(8, network.in_channels, side, side, generator=generator)
    timesteps = torch.linspace(0, 999, 8).long()
    labels = torch.arange(8)
    ours = family.assemble(family.full_own(Mode.DENSE), Mode.DENSE)
    return float((ours(x, timesteps, labels) - theirs(x, timesteps, labels).sample).abs().max())


def _alone(family: Family, own: object) -> DenseDiT:
    """The same layers, trained as a build does, but on the data alone."""
    assert isinstance(own, DenseLayers)
    model = DenseDiT(family.stem, own.layers())
    tuned = _tuned(family, model, None)
    say("not taught", loss=tuned.heldout_loss, steps=tuned.steps)
    return model


def _pruned(family: Family, depth: int, rate: float | None) -> DenseDiT:
    """Pruned greedily, then trained on the data for as long.

    Everything by AdamW at a learning rate, or None: the layers as a build trains them.
    """
    ancestors = quality.lab().ancestors
    model = pruned(ancestors.dense(), ancestors, depth)
    tuned = _tuned(family, model, rate)
    say("pruned", rate=rate, loss=tuned.heldout_loss, steps=tuned.steps)
    return model


def _tuned(family: Family, model: DenseDiT, rate: float | None) -> Tuned:
    def predict(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        with training_precision(x.device):
            prediction: Tensor = model(x, timesteps, class_labels)
        return prediction.float()

    brief = RefinementConfig(max_seconds=SECONDS, patience=10**6)
    data = quality.lab().ancestors.splits.training
    if rate is None:
        own = optimizer_of(model)
        return Tuning(family, model.layers, predict, brief, data, optimizer=own).run(None)
    brief = brief.model_copy(update={"learning_rate": rate})
    return Tuning(family, model, predict, brief, data).run(None)


def _network(family: Family, own: object) -> DenseDiT:
    assert isinstance(own, DenseLayers)
    return DenseDiT(family.stem, own.layers()).eval().requires_grad_(False)


def _judged(model: DenseDiT) -> Figures:
    heldout = quality.lab().ancestors.splits.heldout
    loss = round(denoising_loss(model, heldout, quality.SETTING), 5)
    return {"loss": loss, **quality.judged(model)}
