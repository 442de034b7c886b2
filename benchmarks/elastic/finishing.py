"""What it is worth to finish a request by a smaller size; and pictures of one seed at every size.

A promise that is in danger while it runs can be kept by a smaller size in the steps that are left.
Beside it: the smaller size from the first step on, as if the danger had been seen in time.
"""

import functools

import torch
from torch import Tensor, nn

from benchmarks.parts import RESULTS, Figures, say
from benchmarks.sampling import families
from learngenes.config import DType, Mode, Sampling, SamplingRequest, Scheduler, Size
from learngenes.data.images import encode_png, grid
from learngenes.family.family import Family
from learngenes.model.sampling import sample
from learngenes.sizing.ladder import Rung, ladder
from learngenes.training.pictures import sampled

COUNT = 2_000
STEPS = 12
SHARES = (0.25, 0.5, 0.75)
"""Shares of the steps that the smaller size makes, the last ones."""
BATCH = 125
IMAGES = 12


class Finished(nn.Module):
    """The one model in the first steps, the other in the rest."""

    def __init__(self, first: nn.Module, rest: nn.Module, steps: int, of: int) -> None:
        super().__init__()
        self.first, self.rest, self.steps, self.of = first, rest, steps, of
        self.config, self.stem, self.done = first.config, first.stem, 0

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        model = self.first if self.done % self.of < self.steps else self.rest
        self.done += 1
        prediction: Tensor = model(x, timesteps, class_labels)
        return prediction


def finishing() -> Figures:
    family, judge = families.shipped("fashion"), families.judge("fashion")
    labels = torch.arange(COUNT) % len(judge.class_names)
    network = functools.partial(_network, family)
    full = network(family.full_size.depth)

    def judged(model: nn.Module) -> Figures:
        parts = [
            sample(
                model,
                family.manifest.diffusion,
                labels[seeds].tolist(),
                seeds.tolist(),
                num_inference_steps=STEPS,
                guidance_scale=1.0,
                scheduler=Scheduler.DPMSOLVER,
            )
            for seeds in torch.arange(COUNT).split(BATCH)
        ]
        fd, accuracy = judge.judged(torch.cat(parts), labels)
        return {"fd": round(fd, 1), "class_accuracy": round(accuracy, 4)}

    rows = [{"rest": None, "share": 0.0, **judged(full)}]
    for depth in sorted({rung.size.depth for rung in rungs(family)})[:-1]:
        rest = network(depth)
        for share in (*SHARES, 1.0):
            steps = round((1 - share) * STEPS)
            figures = judged(Finished(full, rest, steps, STEPS))
            rows.append({"rest": depth, "share": share, **figures})
            say("finished", **rows[-1])
    alone = {row["rest"]: row["fd"] for row in rows if row["share"] == 1}
    half = [row for row in rows if row["share"] == 0.5]
    worth = [row["fd"] / alone[row["rest"]] for row in half]
    return {"finishing": rows, "finished_half_fd_over_smaller_alone": round(max(worth), 3)}


def pictures() -> Figures:
    """Draw the same seeds by every rung, the best first."""
    family = families.shipped("fashion")
    labels = torch.arange(IMAGES) % len(family.manifest.class_names)
    every = rungs(family)
    rows = [sampled(family, family.scales_of(r.size), r.sampling, labels).numpy() for r in every]
    (RESULTS / "elastic.png").write_bytes(encode_png(grid(rows, 2)))
    return {"rungs": [[str(rung.size), str(rung.sampling), rung.quality] for rung in every]}


def rungs(family: Family) -> tuple[Rung, ...]:
    """What an elastic request that leaves all open may be served by, the best first."""
    table = family.quality
    assert table is not None
    return ladder(
        table,
        family.manifest.sizes,
        table.samplings(SamplingRequest()) or [Sampling()],
        top=family.full_size,
        mode=Mode.MATERIALISED,
        dtype=DType.FLOAT32,
    )


def _network(family: Family, depth: int) -> nn.Module:
    size = Size(depth=depth, rank=family.full_size.rank)
    return family.assemble(family.scales_of(size), Mode.MATERIALISED)
