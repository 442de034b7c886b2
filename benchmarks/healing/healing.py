"""Held-out loss of a family's depths with U and V, or W, in few bits: rounded, repaired, healed.

Every way has the same bytes. Healed: the rounding of `rounded`, then Sigma alone for 300 steps.
"""

import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator

from torch import Tensor

from benchmarks.healing.families import Trained
from benchmarks.healing.rivals import RIVALS
from benchmarks.parts import RESULTS, Figures, say
from learngenes.config import DType, Kind, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.model.dense import DenseDiT, Weights, materialised
from learngenes.model.diffusion import Predict, heldout_loss, noise_process
from learngenes.model.factors import DenseLayers, Learngenes, Scales
from learngenes.model.frozen import as_served
from learngenes.sizing.cost import rounded_bytes
from learngenes.training.prepare import HEALED, HEALING
from learngenes.training.retrain import retrain

DEPTHS = (12, 8, 4)
Round = Callable[[Tensor, int], Tensor]


def measure(trained: Trained) -> Figures:
    family, training, judged = trained()
    cells = list(_cells(family, training, judged))
    return {"cells": cells, "healing_steps": HEALING.steps}


def _cells(family: Family, training: LabelledImages, judged: LabelledImages) -> Iterator[Figures]:
    process = noise_process(family.manifest.diffusion)
    images, labels = judged.normalised(), judged.labels

    def loss(predict: Predict) -> float:
        return round(heldout_loss(predict, process, images, labels), 5)

    for depth in DEPTHS:
        scales = family.scales_of(Size(depth=depth, rank=family.full_size.rank))
        exact = loss(_written(family, materialised(family.genes, scales)))
        for mode, dtype in HEALED:
            bits = dtype.bits
            assert bits is not None
            losses = {
                name: loss(_rounded(family, scales, mode, bits, rounding))
                for name, rounding in RIVALS.items()
            }
            started = time.monotonic()
            healed = _healed(family, scales, training, mode, dtype)
            seconds = time.monotonic() - started
            own = as_served(family.genes, healed, mode, dtype)
            assert isinstance(own, DenseLayers)
            losses["healed"] = loss(family.assemble(own, Mode.MATERIALISED))
            cell = {
                "depth": depth,
                "mode": str(mode),
                "bits": bits,
                "loss_16_bits": exact,
                "losses": losses,
                "healing_seconds": round(seconds, 1),
                "bytes": _bytes(family, depth, mode, bits),
            }
            say("cell", **cell)
            yield cell


def _healed(
    family: Family, scales: Scales, training: LabelledImages, mode: Mode, dtype: DType
) -> Scales:
    begun = Scales.from_stacked(scales.stacked())
    return retrain(family, begun, HEALING, data=training, mode=mode, dtype=dtype).scales


def _rounded(family: Family, scales: Scales, mode: Mode, bits: int, rounding: Round) -> DenseDiT:
    if mode is Mode.FACTORED:
        genes = _rounded_genes(family.genes, bits, rounding)
        return _written(family, materialised(genes, scales))
    layers = materialised(family.genes, scales)
    return _written(
        family, [{k: (rounding(w, bits), bias) for k, (w, bias) in one.items()} for one in layers]
    )


def _rounded_genes(genes: Learngenes, bits: int, rounding: Round) -> Learngenes:
    rounded = copy.deepcopy(genes)
    for kind in Kind:
        rounded.u[kind].data = rounding(genes.u[kind].detach(), bits)
        rounded.v[kind].data = rounding(genes.v[kind].detach().T, bits).T
    return rounded


def _written(family: Family, layers: list[Weights]) -> DenseDiT:
    return DenseDiT(family.stem, layers).eval().requires_grad_(False)


def _bytes(family: Family, depth: int, mode: Mode, bits: int) -> int:
    """Bytes of the matrices alone."""
    rank, shapes = family.full_size.rank, [k.shape(family.manifest.network.width) for k in Kind]
    if mode is Mode.MATERIALISED:
        return depth * sum(int(rounded_bytes(m, n, bits)) for m, n in shapes)
    return sum(int(rounded_bytes(m, rank, bits) + rounded_bytes(rank, n, bits)) for m, n in shapes)


def both() -> Figures:
    """Of both families, U and V rounded; losses are means over families and depths."""
    parts = json.loads((RESULTS / "healing.json").read_text())["parts"]
    cells = [c for name in ("fashion", "emoji") for c in parts[name]["cells"]]
    factored = [cell for cell in cells if cell["mode"] == Mode.FACTORED]

    def means(bits: int) -> Figures:
        chosen = [cell for cell in factored if cell["bits"] == bits]
        exact = statistics.mean(cell["loss_16_bits"] for cell in chosen)
        ways = {
            way: statistics.mean(cell["losses"][way] for cell in chosen)
            for way in chosen[0]["losses"]
        }
        return {way: round(mean, 5) for way, mean in {"16 bits": exact, **ways}.items()}

    four, three = means(4), means(3)
    rivals = [[losses[way] for way in RIVALS] for losses in (four, three)]
    gaps = [c["losses"]["healed"] - c["loss_16_bits"] for c in factored if c["bits"] == 4]
    return {
        "healed_4bit_gap": round(max(gaps), 5),
        "healed_over_best_rival": {
            "4 bits": round(four["healed"] / min(rivals[0]), 4),
            "3 bits": round(three["healed"] / min(rivals[1]), 4),
        },
        "losses_4_bits": four,
        "losses_3_bits": three,
    }
