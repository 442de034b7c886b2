"""Train a DiT with diffusers, accelerate and datasets alone: nothing of fineserve is imported.

On from an export of `fineserve models export MODEL`, as the paper trains on after Sigma:

    python examples/train_diffusers.py DATASET OUT --model MODEL --steps 500

or from scratch, which makes a teacher for `fineserve condense`:

    accelerate launch --mixed_precision bf16 examples/train_diffusers.py DATASET OUT --depth 12

DATASET is a directory of class folders of images, or one of `datasets.save_to_disk` with the
columns `image` and `label`.
"""

import argparse
import copy
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderKL, DDIMScheduler, DDPMScheduler, DiTTransformer2DModel
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

NOISE = {"beta_schedule": "squaredcos_cap_v2", "prediction_type": "v_prediction"}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", type=Path, help="an export to go on with")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--null-probability", type=float, default=0.1, help="for guidance")
    parser.add_argument("--ema-decay", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    for name, default in (("depth", 12), ("width", 128), ("heads", 4), ("patch-size", 4)):
        parser.add_argument(f"--{name}", type=int, default=default, help="from scratch")
    return parser.parse_args()


def new_network(images: datasets.Dataset, options: argparse.Namespace) -> DiTTransformer2DModel:
    picture = np.asarray(images[0]["image"])
    network = DiTTransformer2DModel(
        num_attention_heads=options.heads,
        attention_head_dim=options.width // options.heads,
        in_channels=1 if picture.ndim == 2 else picture.shape[2],
        num_layers=options.depth,
        sample_size=picture.shape[0],
        patch_size=options.patch_size,
        num_embeds_ada_norm=images.features["label"].num_classes,
    )
    for block in network.transformer_blocks:  # adaLN-Zero: each begins as the identity
        torch.nn.init.zeros_(block.norm1.linear.weight)
        torch.nn.init.zeros_(block.norm1.linear.bias)
    torch.nn.init.zeros_(network.proj_out_2.weight)
    torch.nn.init.zeros_(network.proj_out_2.bias)
    return network


def load(path: Path) -> datasets.Dataset:
    if any((path / file).exists() for file in ("dataset_dict.json", "state.json")):
        saved = datasets.load_from_disk(str(path))
        return saved["train"] if isinstance(saved, datasets.DatasetDict) else saved
    return datasets.load_dataset("imagefolder", data_dir=str(path), split="train")


def collate(rows: list[dict[str, object]]) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, C, H, W) in [-1, 1], and (N,)."""
    pictures = [np.atleast_3d(np.asarray(row["image"])) for row in rows]
    images = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    return images, torch.tensor([row["label"] for row in rows])


def encoder(model: Path | None, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images to what the network sees: an export with `vae/` is of latents."""
    if model is None or not (model / "vae").is_dir():
        return lambda images: images
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae").to(device)

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(images).latent_dist.sample()
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    return encode


def save(
    network: DiTTransformer2DModel, noise: DDPMScheduler, out: Path, model: Path | None
) -> None:
    for block in network.transformer_blocks:  # a copy in each, as diffusers keeps them
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    network.save_pretrained(out / "transformer")
    DDIMScheduler.from_config(noise.config, timestep_spacing="trailing").save_pretrained(
        out / "scheduler"
    )
    if model and (model / "vae").is_dir():  # `DiTPipeline` loads it, too
        shutil.copytree(model / "vae", out / "vae", dirs_exist_ok=True)
        shutil.copy(model / "model_index.json", out)


def main() -> None:
    options = parse()
    set_seed(options.seed)
    accelerator = Accelerator()
    images = load(options.dataset)
    if options.model:
        network = DiTTransformer2DModel.from_pretrained(options.model, subfolder="transformer")
        noise = DDPMScheduler.from_pretrained(options.model, subfolder="scheduler")
    else:
        network, noise = new_network(images, options), DDPMScheduler(**NOISE)
    blocks = network.transformer_blocks
    for block in blocks:  # one embedder for all blocks, as DiT has it
        block.norm1.emb = blocks[0].norm1.emb
    network.eval()  # else diffusers' blocks drop labels, too, and each block others
    encode = encoder(options.model, accelerator.device)

    null_class = network.config.num_embeds_ada_norm
    if len(images) < options.batch_size:
        raise SystemExit(f"{len(images)} images are less than one batch: lower --batch-size")
    loader = DataLoader(
        images, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=0.0)
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    network, optimizer, loader, schedule = accelerator.prepare(network, optimizer, loader, schedule)
    average = EMAModel(network.parameters(), decay=options.ema_decay, use_ema_warmup=True)
    average.to(accelerator.device)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    progress = tqdm(range(options.steps), disable=not accelerator.is_main_process)
    for _, (pictures, labels) in zip(progress, batches, strict=False):
        clean = encode(pictures)
        drawn = torch.randn_like(clean)
        timesteps = torch.randint(noise.config.num_train_timesteps, labels.shape).to(clean.device)
        dropped = torch.rand(labels.shape, device=labels.device) < options.null_probability
        given = labels.masked_fill(dropped, null_class)
        target = drawn
        if noise.config.prediction_type == "v_prediction":
            target = noise.get_velocity(clean, drawn, timesteps)
        noisy = noise.add_noise(clean, drawn, timesteps)
        predicted = network(noisy, timesteps, given).sample
        loss = F.mse_loss(predicted.float(), target)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average.step(network.parameters())
        progress.set_postfix(loss=f"{loss.item():.4f}", refresh=False)

    if accelerator.is_main_process:
        network = accelerator.unwrap_model(network)
        average.copy_to(network.parameters())
        save(network, noise, options.out, options.model)


if __name__ == "__main__":
    main()
