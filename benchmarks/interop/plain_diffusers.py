"""Sample from an export with diffusers alone; run by `python -I`, which finds nothing of ours.

python -I plain_diffusers.py EXPORT OUT.npy '{"steps": …, "seeds": …, "labels": …, "guidance": …}'
"""

import json
import sys

import numpy as np
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

OURS = ("fineserve", "learngenes", "registry", "service", "worker")
sys.modules.update(dict.fromkeys(OURS))  # an editable install finds them even so


@torch.inference_mode()
def main(directory: str, out: str, wanted: str) -> None:
    """Writes float32 (N, C, H, W), about -1 to 1."""
    asked = json.loads(wanted)
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


if __name__ == "__main__":
    main(*sys.argv[1:])
