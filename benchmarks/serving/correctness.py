"""Check 4: 1,000 random requests at once, each compared with its run alone, byte by byte."""

import random
import time

import numpy as np

from benchmarks.parts import Figures, say
from benchmarks.serving.engine import engine, request
from benchmarks.serving.subjects import SEED, sizes
from learngenes.config import SHARED_MODES, DType, Mode, Scheduler
from learngenes.family.family import Family
from worker.sampling.jobs import SampleRequest

REQUESTS = 1000
MODELS = 60
CANCELLED_EVERY = 10


def measure() -> Figures:
    chance = random.Random(SEED)
    with engine() as (started, loaded):
        wanted = [_random(loaded, chance) for _ in range(REQUESTS)]
        tickets = []
        for number, one in enumerate(wanted):
            tickets.append(started.submit(one))
            if number % CANCELLED_EVERY == 0:  # and one more, that is cancelled on its way
                started.cancel(started.submit(_random(loaded, chance)))
            time.sleep(chance.expovariate(100))
        mixed = [ticket.wait() and ticket.images() for ticket in tickets]
        mismatches = 0
        for one, together in zip(wanted, mixed, strict=True):
            ticket = started.submit(one)
            ticket.wait()
            alone = ticket.images()
            mismatches += not all(map(np.array_equal, alone, together))
    figures = {"requests": REQUESTS, "solo_vs_batch_mismatches": mismatches}
    say("correctness", **figures)
    return figures


def _random(loaded: Family, chance: random.Random) -> SampleRequest:
    """Any model, mode, dtype, number of images and steps, guidance and scheduler."""
    number = chance.randrange(MODELS)
    dtype = list(DType)[number % len(DType)]
    images = chance.choice((1, 1, 1, 2, 4))
    return request(
        loaded,
        sizes(MODELS)[number],
        number,
        mode=Mode.FACTORED if dtype is DType.INT8 else SHARED_MODES[number % 2],
        dtype=dtype,
        labels=[chance.randrange(10) for _ in range(images)],
        seeds=[chance.randrange(10**6) for _ in range(images)],
        steps=chance.choice((1, 2, 5, 10)),
        guidance_scale=chance.choice((1.0, 2.0, 4.0)),
        scheduler=chance.choice([*Scheduler]),
    )
