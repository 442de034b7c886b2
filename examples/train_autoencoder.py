"""Train an AutoencoderKL with diffusers, accelerate and datasets alone, for a family of latents.

    python examples/train_autoencoder.py DATASET OUT --channels 32 64 64 --steps 4000

DATASET is a directory of class folders of images, or one of `datasets.save_to_disk` with a column
`image`. The loss is the absolute error, with a little of the KL divergence from a normal one.
"""

import argparse
import itertools
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--channels", type=int, nargs="+", default=[32, 64, 64])
    parser.add_argument("--latent-channels", type=int, default=4)
    parser.add_argument("--groups", type=int, default=8, help="of GroupNorm")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--kl-weight", type=float, default=1e-4)
    parser.add_argument("--flip", action="store_true", help="every second image, left and right")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def load(path: Path) -> datasets.Dataset:
    if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")


def collate(rows: list[dict[str, object]]) -> torch.Tensor:
    """(N, C, H, W) in [-1, 1]."""
    pictures = [np.atleast_3d(np.asarray(row["image"])) for row in rows]
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def new_network(example: torch.Tensor, options: argparse.Namespace) -> AutoencoderKL:
    blocks = len(options.channels)
    return AutoencoderKL(
        in_channels=example.shape[0],
        out_channels=example.shape[0],
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        block_out_channels=options.channels,
        latent_channels=options.latent_channels,
        norm_num_groups=options.groups,
        sample_size=example.shape[-1],
        scaling_factor=1.0,
    )


class Reconstruction(torch.nn.Module):
    """What is trained, as one module: several GPUs agree on the gradients of its forward pass."""

    def __init__(self, autoencoder: AutoencoderKL) -> None:
        super().__init__()
        self.autoencoder = autoencoder

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Images again, and the mean KL divergence of a value of their latents."""
        drawn = self.autoencoder.encode(images).latent_dist
        decoded = self.autoencoder.decode(drawn.sample()).sample
        return decoded, drawn.kl().mean() / drawn.mean[0].numel()


@torch.no_grad()
def scaling_factor(network: AutoencoderKL, images: torch.Tensor) -> float:
    """One over the standard deviation of the latents."""
    return 1 / network.encode(images).latent_dist.mean.std().item()


def main() -> None:
    options = parse()
    set_seed(options.seed)
    accelerator = Accelerator()
    images = load(options.dataset)
    network = Reconstruction(new_network(collate([images[0]])[0], options))
    if len(images) < options.batch_size:
        raise SystemExit(f"{len(images)} images are less than one batch: lower --batch-size")
    loader = DataLoader(
        images, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=0.0)
    # not prepared: accelerate would take a step of it for every process
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    average = EMAModel(network.parameters(), decay=0.995, use_ema_warmup=True)
    average.to(accelerator.device)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    progress = tqdm(range(options.steps), disable=not accelerator.is_main_process)
    for _, clean in zip(progress, batches, strict=False):
        seen = clean
        if options.flip:
            mirrored = torch.rand(len(clean), 1, 1, 1, device=clean.device) < 0.5
            seen = torch.where(mirrored, clean.flip(3), clean)
        decoded, divergence = network(seen)
        error = F.l1_loss(decoded.float(), seen)
        loss = error + options.kl_weight * divergence
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        progress.set_postfix(error=f"{error.item():.4f}", refresh=False)

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(network)
        average.copy_to(network.parameters())
        network = network.autoencoder
        some = collate([images[i] for i in range(min(256, len(images)))]).to(accelerator.device)
        network.register_to_config(scaling_factor=scaling_factor(network, some))
        network.save_pretrained(options.out)


if __name__ == "__main__":
    main()
