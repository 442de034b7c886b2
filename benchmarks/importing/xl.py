"""A DiT-XL/2 of random weights, imported in a process of its own: the memory that it takes."""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from benchmarks.parts import Figures

CONFIG = """
name = "xl"
rank = 1152
order_images = 1
calibration_seconds = 0
[data]
path = "{path}"
limited_images = 10
heldout_images = 2
licence = "noise"
[sizes]
depths = [7, 14, 21, 28]
ranks = [1152]
[training]
steps = 1
"""


def measure() -> Figures:
    with tempfile.TemporaryDirectory() as directory:
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.importing.xl", directory],
            check=True,
            capture_output=True,
            text=True,
        )
    figures: Figures = json.loads(run.stdout.splitlines()[-1])
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {**figures, "of_machine_gb": round(machine / 1e9, 1)}


def main(directory: Path) -> None:
    from learngenes.training.condense import condense

    _write_teacher(directory / "teacher")
    _write_images(directory / "images")
    config = directory / "config.toml"
    config.write_text(CONFIG.format(path=directory / "images"))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.monotonic()
    family = condense(
        str(directory / "teacher"), config, directory / "work", directory / "xl", import_only=True
    )
    assert family.imported is not None
    numbers = sum(tensor.numel() for tensor in family.imported.stacked().values())
    figures = {
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "peak_gb_before": round(before * 1024 / 1e9, 2),
        "numbers_in_layers": numbers,
        "import_seconds": round(time.monotonic() - started),
        "file_gb": round((directory / "xl" / "imported.safetensors").stat().st_size / 1e9, 2),
    }
    sys.stdout.write(json.dumps(figures) + "\n")


def _write_teacher(directory: Path) -> None:
    import torch
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    torch.manual_seed(0)
    network = DiTTransformer2DModel(
        num_attention_heads=16,
        attention_head_dim=72,
        in_channels=3,  # there is no autoencoder beside it, so that images are what it denoises
        num_layers=28,
        sample_size=32,
        patch_size=2,
    )
    first = network.transformer_blocks[0].norm1.emb
    for block in network.transformer_blocks:  # each has a copy of one embedder, as DiT is trained
        block.norm1.emb.load_state_dict(first.state_dict())
    network.save_pretrained(directory / "transformer")
    DDPMScheduler().save_pretrained(directory / "scheduler")


def _write_images(directory: Path) -> None:
    from PIL import Image

    generator = np.random.default_rng(0)
    for split in ("train", "test"):
        for name in ("one", "other"):
            folder = directory / split / name
            folder.mkdir(parents=True)
            for index in range(6):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
