"""Check 3: resident memory of many models, and what their mix costs in speed.

Each side is a process of its own, `python -m benchmarks.serving.density SIDE`, that takes on more
and more models, has each of them make an image of one step, and tells what it then holds.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from benchmarks.parts import Figures, say
from benchmarks.serving.engine import engine, images_per_second, request
from benchmarks.serving.subjects import family, sizes
from learngenes.config import Size
from learngenes.device import release_memory
from learngenes.formats.diffusers import export_model

COUNTS = (1, 10, 100, 500)
SMALL_BUDGET_BYTES = 250 * 10**6
"""Budget in which the engine keeps Sigma of every model, and W of those used last."""
CLIENTS = 16
SECONDS = 15.0
MIX = 100


def measure() -> Figures:
    held = {side: _held(side) for side in SIDES}
    ratios = {count: held["pipelines"][count] / held["engine"][count] for count in held["engine"]}
    figures = {
        "resident_bytes": held,
        "resident_ratio_100_models": round(ratios["100"], 2),
        "marginal_bytes_per_model": {
            side: round((h["500"] - h["10"]) / 490) for side, h in held.items()
        },
        **_mix(),
    }
    say("density", **figures)
    return figures


def _mix() -> Figures:
    """100 models of the full size beside one, 16 requests under way at all times."""
    full = Size(depth=8, rank=256)
    with engine() as (started, loaded):
        one = images_per_second(started, [request(loaded, full, 0)], CLIENTS, SECONDS)
        many = [request(loaded, full, number) for number in range(MIX)]
        for number in range(MIX):  # ready, as every deployed model soon is
            started.submit(request(loaded, full, number, steps=1)).wait()
        mix = images_per_second(started, many, CLIENTS, SECONDS)
        again = images_per_second(started, [request(loaded, full, 0)], CLIENTS, SECONDS)
        held = started.residency.nbytes
    return {
        "one_model_images_per_second": [round(one, 2), round(again, 2)],
        "mix100_images_per_second": round(mix, 2),
        "mix100_throughput_ratio": round(2 * mix / (one + again), 3),
        "mix100_engine_bytes": held,
    }


def _held(side: str) -> dict[str, int]:
    """Resident bytes by number of models."""
    command = [sys.executable, "-m", "benchmarks.serving.density", side]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    held: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    return held


def _engine() -> Iterator[None]:
    with engine(SMALL_BUDGET_BYTES) as (started, loaded):
        for number, size in enumerate(sizes(COUNTS[-1])):
            ticket = started.submit(request(loaded, size, number, steps=1))
            ticket.wait()
            ticket.images()
            yield


def _pipelines() -> Iterator[None]:
    """What keeping every model as diffusers loads it would take."""
    loaded = family()
    pipelines = []
    with tempfile.TemporaryDirectory() as directory, torch.inference_mode():
        for size in sizes(COUNTS[-1]):
            path = Path(directory) / f"L{size.depth} r{size.rank}"
            if not path.exists():
                export_model(loaded, loaded.scales_of(size), path)
            network = DiTTransformer2DModel.from_pretrained(
                path / "transformer", torch_dtype=torch.bfloat16
            )
            scheduler = DDIMScheduler.from_pretrained(path / "scheduler")
            x = torch.zeros(2, 1, 28, 28, dtype=torch.bfloat16)
            network(x, torch.zeros(2), class_labels=torch.zeros(2, dtype=torch.long))
            pipelines.append((network, scheduler))
            yield


SIDES = {"engine": _engine, "pipelines": _pipelines}


def main() -> None:
    held = {}
    for count, _ in enumerate(SIDES[sys.argv[1]](), start=1):
        if count in COUNTS:
            release_memory(torch.device("cpu"))
            status = Path("/proc/self/status").read_text()
            found = re.search(r"^VmRSS:\s+(\d+) kB$", status, re.MULTILINE)
            assert found is not None
            held[count] = int(found[1]) * 1024
    sys.stdout.write(json.dumps(held) + "\n")


if __name__ == "__main__":
    main()
