"""By how weak a size, and in which steps, the full size is best guided."""

import torch

from benchmarks.parts import Figures, say
from benchmarks.sampling import families
from learngenes.config import Sampling, Scheduler, Size
from learngenes.training.pictures import sampled

COUNT = 2_000
STEPS = 10
INTERVALS = ((0.0, 1.0), (0.2, 0.8))
SCALES = (1.5, 2.0, 2.5)


def fashion() -> Figures:
    return _measured("fashion")


def emoji() -> Figures:
    return _measured("emoji")


def _measured(name: str) -> Figures:
    family, judge = families.shipped(name), families.judge(name)
    sizes = family.manifest.sizes
    labels = torch.arange(COUNT) % len(judge.class_names)
    ranks = sorted({sizes.ranks[0], sizes.middle.rank, sizes.ranks[-1]})
    guides = [None, *(Size(depth=d, rank=r) for d in sizes.depths[:2] for r in ranks)]
    rows = []

    def row(**how: object) -> None:
        by = Sampling(num_inference_steps=STEPS, scheduler=Scheduler.DPMSOLVER, **how)
        fd, accuracy = judge.judged(sampled(family, family.scales, by, labels), labels)
        figures = {"fd": round(fd, 1), "class_accuracy": round(accuracy, 4)}
        say(name, **how, **figures)
        rows.append({**by.model_dump(mode="json"), **figures})

    row(guidance_scale=1)
    for guide in guides:
        for start, stop in INTERVALS:
            for scale in SCALES:
                row(guidance_scale=scale, guidance_start=start, guidance_stop=stop, guide=guide)
    return {"count": COUNT, "rows": rows, "best": min(rows, key=lambda each: each["fd"])}
