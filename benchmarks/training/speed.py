"""Check 1: images a second in the shipped setting, beside the commit before, and losses after.

The same images in each, trained in turn, a part of the steps at a time. Before, a step trained the
full size and a drawn size; `one depth` is what either commit takes for the full size alone.
"""

import contextlib
import functools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import baseline
from benchmarks.parts import REPOSITORY, Figures, say
from learngenes.config import Kind
from learngenes.stepping.arithmetic import BLOCK_KINDS
from learngenes.training.config import PretrainingConfig, TrainingConfig

CONFIG = REPOSITORY / "families" / "fashion" / "config.toml"
BATCH, BEFORE_BATCH = 64, 32
RATES = ("learning_rate", "sigma_learning_rate", "factor_learning_rate")
WARM_UP_IMAGES = 6_400
"""Images of the learning rates' warm-up, in both."""
IMAGES = 38_400
"""Images that each is trained on, in ROUNDS parts; small depths begin with one of them."""
WHOLE_IMAGES = 288_000
"""Images of a whole training of `fashion`."""
ROUNDS, DEPTHS_FROM_ROUND = 10, 7
ONE_DEPTH_IMAGES = 3_840
AVERAGE_IMAGES = 3_200
"""Images that the averaged weights reach back, in both; those of the shipped configuration before
would remember the beginning of a training that is so short."""
WARM_UP_STEPS = 3
REPETITIONS = 10


@dataclass
class Trainer:
    """A training in a process of its own."""

    batch_size: int
    process: subprocess.Popen[str]
    images: int = 0
    seconds: float = 0.0
    warm_up_seconds: float = 0.0

    def ask(self, command: str | int) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(command) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def train(self, images: int) -> None:
        steps = images // self.batch_size
        self.seconds += self.ask(steps)["seconds"]
        self.images += steps * self.batch_size

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds


@contextlib.contextmanager
def trainer(repository: Path, config: PretrainingConfig, **training: object) -> Iterator[Trainer]:
    """`training` is in the words of the commit in `repository`."""
    words = json.loads(config.model_dump_json(exclude={"training"}))
    words["training"] = training
    script = Path(__file__).parent / "trainer.py"
    with subprocess.Popen(
        [sys.executable, script],
        env=baseline.environment(repository),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdin is not None
        process.stdin.write(json.dumps(words) + "\n")
        batch_size = training["batch_size"]
        assert isinstance(batch_size, int)
        yield Trainer(batch_size, process)
        process.stdin.close()


def measure() -> Figures:
    shipped = PretrainingConfig.read(CONFIG)
    share, steps = DEPTHS_FROM_ROUND / ROUNDS, IMAGES // BATCH + 2 * WARM_UP_STEPS
    depths_from = (share * (IMAGES // BATCH) + WARM_UP_STEPS) / steps
    training = shipped.training.model_copy(update={"batch_size": BATCH, "depths_from": depths_from})
    config = shipped.model_copy(update={"training": training})
    then = {
        "form": "any-size",
        "batch_size": BEFORE_BATCH,
        "steps": IMAGES // BEFORE_BATCH,
        "warmup_steps": WARM_UP_IMAGES // BEFORE_BATCH,
        "ema_decay": 1 - BEFORE_BATCH / AVERAGE_IMAGES,
    }
    now = {
        "batch_size": BATCH,
        "steps": steps,
        "depths_from": depths_from,
        "warmup_steps": WARM_UP_IMAGES // BATCH,
        "ema_decay": 1 - BATCH / AVERAGE_IMAGES,
        **_rates(config.training),
    }
    stages: list[float] = []
    with (
        trainer(baseline.checkout(), config, **then) as old,
        trainer(REPOSITORY, config, **now) as new,
    ):
        _warm_up(old, new)
        for part in range(ROUNDS):
            if part == DEPTHS_FROM_ROUND:
                stages.append(new.images_per_second)
                _warm_up(new)
            for each in (old, new):
                each.train(IMAGES // ROUNDS)
            speeds = {"before": old.images_per_second, "now": new.images_per_second}
            say("images a second", part=part + 1, **speeds)
        stages.append(new.images_per_second)
        losses = {"before": old.ask("loss")["losses"], "now": new.ask("loss")["losses"]}
        once_seconds = new.warm_up_seconds
    one_before, one_now = _of_one_depth(config, then, now)
    seconds = WHOLE_IMAGES * (share / stages[0] + (1 - share) / stages[1]) + once_seconds
    full_before, full_now = (next(iter(losses[when].values())) for when in ("before", "now"))
    return {
        "images_per_second_over_before": round(WHOLE_IMAGES / seconds / old.images_per_second, 2),
        "heldout_loss_over_before": round(full_now - full_before, 5),
        "over_before_at_one_depth": round(one_now / one_before, 2),
        "gemm_peak_share": round(products_seconds(config) * one_now / BATCH, 3),
        "images_per_second": {
            "before": round(old.images_per_second, 1),
            "now, of a whole training": round(WHOLE_IMAGES / seconds, 1),
            "now, one depth first": round(stages[0], 1),
            "now, all depths late": round(stages[1], 1),
            "before, one depth": round(one_before, 1),
            "now, one depth": round(one_now, 1),
        },
        "compiling_and_ordering_seconds": round(once_seconds, 1),
        "images": IMAGES,
        "whole_images": WHOLE_IMAGES,
        "heldout_loss": losses,
        "batch_size": {"before": BEFORE_BATCH, "now": BATCH},
    }


def _rates(training: TrainingConfig) -> Figures:
    """Learning rates of larger batches: by the square root, as Adam's (arXiv 2205.10287)."""
    factor = math.sqrt(BATCH / BEFORE_BATCH)
    return {rate: factor * getattr(training, rate) for rate in RATES}


def _of_one_depth(config: PretrainingConfig, then: Figures, now: Figures) -> tuple[float, float]:
    """Images a second of either commit where the full size alone is trained."""
    with (
        trainer(baseline.checkout(), config, **{**then, "form": "fixed-depth"}) as old,
        trainer(REPOSITORY, config, **{**now, "depths_from": 1}) as new,
    ):
        _warm_up(old, new)
        for _ in range(2):
            for each in (old, new):
                each.train(ONE_DEPTH_IMAGES // 2)
        return old.images_per_second, new.images_per_second


def _warm_up(*trainers: Trainer) -> None:
    """Compile, and order layers: what is done once is no part of the speed, but kept apart."""
    for each in trainers:
        each.images, each.seconds = 0, 0.0
        each.train(WARM_UP_STEPS * each.batch_size)
        each.warm_up_seconds += each.seconds
        each.images, each.seconds = 0, 0.0


def products_seconds(config: PretrainingConfig) -> float:
    """Seconds that the matrix products of one step of the full size take, each alone at its best.

    Three of each, forward and backward: of W with tokens, of U diag(sigma) with V, of attention.
    """
    network, batch = config.network, config.training.batch_size
    tokens, rank = batch * network.tokens, network.rank
    shapes = [(tokens, *kind.shape(network.width)) for kind in BLOCK_KINDS]
    built = [kind.shape(network.width) for kind in BLOCK_KINDS]
    seconds = 0.0
    for rows, outputs, inputs in shapes:
        seconds += network.depth * _product_and_gradients(rows, inputs, outputs)
    for m, n in built:
        seconds += _product_and_gradients(network.depth * m, rank, n)
    heads, d = network.num_attention_heads, network.width // network.num_attention_heads
    for inputs, outputs in ((d, network.tokens), (network.tokens, d)):
        each = _product_and_gradients(network.tokens, inputs, outputs, batch * heads)
        seconds += network.depth * each
    rows = batch
    m, n = Kind.ADALN.shape(network.width)
    seconds += _product_and_gradients(rows, n, rank)
    return seconds + _product_and_gradients(network.depth * rows, rank, m)


def _product_and_gradients(rows: int, inputs: int, outputs: int, stack: int | None = None) -> float:
    def made(*shape: int) -> Tensor:
        return torch.randn(*(() if stack is None else (stack,)), *shape, dtype=torch.bfloat16)

    x, w, y = made(rows, inputs), made(inputs, outputs), made(rows, outputs)
    works: list[Callable[[], Tensor]] = [
        functools.partial(torch.matmul, x, w),
        functools.partial(torch.matmul, y, w.mT),
        functools.partial(torch.matmul, x.mT, y),
    ]
    return sum(map(_median_seconds, works))


def _median_seconds(work: Callable[[], Tensor]) -> float:
    taken = []
    for _ in range(REPETITIONS):
        work()
        started = time.perf_counter()
        work()
        taken.append(time.perf_counter() - started)
    return statistics.median(taken)
