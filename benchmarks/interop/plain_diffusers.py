"""Sample from an export with diffusers alone; run by `python -I`, which finds nothing of ours.

python -I plain_diffusers.py EXPORT OUT.npy '{"steps": …, "seeds": …, "labels": …, "guidance": …}'
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

OURS = ("fineserve", "learngenes", "registry", "service", "worker")
sys.modules.update(dict.fromkeys(OURS))  # an editable install finds them even so


@torch.inference_mode()
def main(directory: str, out: str, wanted: str) -> None:
    """Writes float32 (N, C, H, W), about -1 to 1."""
    asked = json.loads(wanted)
    if (Path(directory) / "model_index.json").exists():
        np.save(out, of_latents(directory, asked))
        return
    transformer = DiTTransformer2DModel.from_pretrained(directory, subfolder="transformer").eval()
    scheduler = DDIMScheduler.from_pretrained(directory, subfolder="scheduler")
    scheduler.set_timesteps(asked["steps"])
    shape = (transformer.config.in_channels, *[transformer.config.sample_size] * 2)
    x = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in asked["seeds"]]
    )
    labels = torch.tensor(asked["labels"] + [1000] * len(asked["labels"]))
    for t in scheduler.timesteps:
        rows = torch.cat([x, x])
        prediction = transformer(rows, t.expand(len(rows)), labels).sample
        conditional, unconditional = prediction.chunk(2)
        guided = unconditional + asked["guidance"] * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    np.save(out, x.numpy())


def of_latents(directory: str, asked: dict[str, Any]) -> np.ndarray:
    """Sample with the whole pipeline, which clips to -1 and 1."""
    pipeline = DiTPipeline.from_pretrained(directory)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        class_labels=asked["labels"],
        generator=[torch.Generator().manual_seed(seed) for seed in asked["seeds"]],
        num_inference_steps=asked["steps"],
        guidance_scale=asked["guidance"],
        output_type="np",
    ).images
    return 2 * np.asarray(images, np.float32).transpose(0, 3, 1, 2) - 1


if __name__ == "__main__":
    main(*sys.argv[1:])
