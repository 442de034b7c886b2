"""The same crowd at other servers, which hold the full size and know of no promise."""

import tempfile
from pathlib import Path

from benchmarks.elastic.arrivals import constant, poisson
from benchmarks.elastic.asking import Body, ask
from benchmarks.parts import Figures, say
from benchmarks.sampling import families
from benchmarks.serving.opponents import body, running
from learngenes.formats.diffusers import export_model

SERVERS = ("litserve", "ray_serve", "bentoml")
MODEL = "full"
SEED = 9
STEPS = 10


def peers(
    family_name: str, requests_per_second: float, images: int, seconds: float, promise: float
) -> Figures:
    """Requests kept within a promise, each second, by each server; `images` of one are as many of
    theirs, unguided, by as many steps as ours."""
    family = families.shipped(family_name)
    moments = poisson(
        constant(requests_per_second * images), requests_per_second * images, seconds, SEED
    )
    classes = len(family.manifest.class_names)
    figures: Figures = {}
    with tempfile.TemporaryDirectory(prefix="peers-") as scratch:
        export_model(family, family.scales, Path(scratch) / MODEL)
        for name in SERVERS:

            def asked(number: int, name: str = name) -> Body:
                return body(
                    name,
                    {
                        "model": MODEL,
                        "class_label": number % classes,
                        "seed": number,
                        "num_inference_steps": STEPS,
                        "guidance_scale": 1.0,
                    },
                )

            with running(name, Path(scratch), dtype="bfloat16", compiled=True) as server:
                answers = ask(server.url, moments, asked)
            kept = sum(answer.kept(promise) for answer in answers)
            figures[name] = {
                "kept": round(kept / len(answers), 4),
                "good_per_second": round(kept / images / seconds, 2),
            }
            say(name, **figures[name])
    best = max(figures[name]["good_per_second"] for name in SERVERS)
    return {**figures, "best_peer_good_per_second": best}
