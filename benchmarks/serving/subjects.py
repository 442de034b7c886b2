"""The models that are served: one of full size, and mixes of every size of the family."""

import itertools
import json
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.deployment import REPOSITORY, Deployment
from benchmarks.serving.load import MakeRequest
from learngenes.config import Size
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import export_model
from registry.store import ArtifactStore
from worker.artifacts import load_own

FAMILY = REPOSITORY / "families" / "fashion"
STEPS = 25
MIX = 20
SEED = 2409
BUILD = {
    "FINESERVE_RETRAINING_STEPS": "2",  # quality is not what is measured here
    "FINESERVE_VERIFY_SECONDS": "0.1",
    "FINESERVE_PROFILE_SECONDS": "5",
}
Figures = dict[str, Any]


def say(name: str, figures: object) -> None:
    sys.stdout.write(f"  {name}: {json.dumps(figures)}\n")
    sys.stdout.flush()


def family() -> Family:
    return load_family(FAMILY)


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
        return str(self.deployment.http.base_url)

    def export(self, directory: Path) -> None:
        """The same weights for the opponents, by model id."""
        loaded = family()
        store = ArtifactStore(self.deployment.path / "var" / "store")
        for model_id in (self.one, *self.mix):
            revision = self.deployment.http.get(f"/models/{model_id}").json()["revision"]
            export_model(loaded, load_own(store, loaded, model_id, revision), directory / model_id)


@contextmanager
def served() -> Iterator[Served]:
    """From a fresh clone, every model in bfloat16, ready."""
    deployment = Deployment()
    deployment.environment |= BUILD
    try:
        deployment.make("up")
        one = _model(deployment, Size(depth=8, rank=256))
        models = [_model(deployment, size) for size in sizes(MIX)]
        for model_id in (one, *models):
            deployment.wait_model(model_id, lambda model: model["status"] == "ready")
        say("models ready", 1 + len(models))
        yield Served(deployment, one, models)
    finally:
        deployment.make("down")
        deployment.remove()


def _model(deployment: Deployment, size: Size) -> str:
    budget = {"max_mem_gb": 4, "depth": size.depth, "rank": size.rank}
    answer = deployment.http.post(
        "/models", json={**budget, "mode": "materialised", "dtype": "bfloat16"}
    )
    return str(answer.raise_for_status().json()["id"])


def requests(models: list[str]) -> MakeRequest:
    """One image each, of the models in a random order."""
    chance = random.Random(SEED)
    order = [chance.randrange(len(models)) for _ in range(10_000)]

    def make(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        model = models[order[number % len(order)]]
        body = {"model": model, "class_labels": [number % 10], "seed": number}
        return "/generate", {**body, "num_inference_steps": STEPS}, {"accept": "image/png"}

    return make


def peer_requests(name: str, models: list[str]) -> MakeRequest:
    """The same for an opponent."""
    from benchmarks.serving.opponents import body

    ours = requests(models)

    def make(number: int) -> tuple[str, dict[str, Any], dict[str, str]]:
        path, request, _ = ours(number)
        label = request.pop("class_labels")[0]
        return path, body(name, {**request, "class_label": label, "guidance_scale": 2.0}), {}

    return make
