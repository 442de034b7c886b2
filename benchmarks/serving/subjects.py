"""The models that are served: one of full size, and mixes of every size of the family."""

import itertools
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.deployment import FAMILIES, Deployment
from benchmarks.parts import say
from benchmarks.serving.load import MakeRequest
from learngenes.config import Size
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import export_model
from registry.store import DirectoryStore, served_name
from worker.artifacts import load_own
from worker.build.restore import kept_record

STEPS = 25
SAMPLING = {"num_inference_steps": STEPS, "guidance_scale": 2.0, "scheduler": "ddim"}
"""Sampling that all servers are asked for."""
MIX = 20
SEED = 2409
BUILD = {"retraining_steps": 2, "verify_seconds": 0.1, "profile_seconds": 5}
"""Quality is not what is measured here."""


def family() -> Family:
    return load_family(FAMILIES / "fashion")


def sizes(count: int) -> list[Size]:
    """Sizes of the family in a shuffled order, all of them before one comes again."""
    space = family().manifest.sizes
    every = [Size(depth=d, rank=r) for d in space.depths for r in space.ranks]
    random.Random(SEED).shuffle(every)
    return list(itertools.islice(itertools.cycle(every), count))


@dataclass(frozen=True)
class Served:
    """A running deployment, with a model of full size and a mix."""

    deployment: Deployment
    one: str
    mix: list[str]

    @property
    def url(self) -> str:
        return self.deployment.url

    def export(self, directory: Path) -> None:
        """The same weights for the opponents, by model id."""
        loaded = family()
        store = DirectoryStore(self.deployment.var / "store")
        for model_id in (self.one, *self.mix):
            record = kept_record(store, model_id)
            assert record is not None, f"{model_id} is not ready"
            own = load_own(store, loaded, served_name(record))
            export_model(loaded, own, directory / model_id)


@contextmanager
def served() -> Iterator[Served]:
    """Every model in bfloat16, ready."""
    with Deployment(**BUILD) as deployment:
        deployment.up()
        one, *mix = (
            deployment.ready_model(
                max_mem_gb=4,
                depth=size.depth,
                rank=size.rank,
                mode="materialised",
                dtype="bfloat16",
            )
            for size in (Size(depth=8, rank=256), *sizes(MIX))
        )
        say(f"{1 + len(mix)} models are ready")
        yield Served(deployment, one, mix)


def requests(models: list[str]) -> MakeRequest:
    """One image each, of the models in a random order."""
    chance = random.Random(SEED)
    order = [chance.randrange(len(models)) for _ in range(10_000)]

    def make(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        model = models[order[number % len(order)]]
        body = {"model": model, "class_labels": [number % 10], "seed": number}
        return "/generate", {**body, **SAMPLING}, {"accept": "image/png"}

    return make


def peer_requests(name: str, models: list[str]) -> MakeRequest:
    """The same for an opponent."""
    from benchmarks.serving.opponents import body

    ours = requests(models)

    def make(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        path, request, _ = ours(number)
        label = request.pop("class_labels")[0]
        request.pop("scheduler")  # they have this one alone
        return path, body(name, {**request, "class_label": label}), {}

    return make
