"""Train a DiT with diffusers, accelerate and datasets alone: nothing of fineserve is imported.

On from an export of `fineserve models export MODEL`, as the paper trains on after Sigma:

    python examples/train_diffusers.py DATASET OUT --model MODEL --steps 500

or from scratch, which makes a teacher for `fineserve condense`:

    accelerate launch --mixed_precision bf16 examples/train_diffusers.py DATASET OUT --depth 12

DATASET is a directory of class folders of images, or one of `datasets.save_to_disk` with the
columns `image` and `label`. Images are scaled to the model's size.
"""

import argparse
import copy
import dataclasses
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
)
from diffusers.optimization import get_cosine_schedule_with_warmup
from diffusers.training_utils import EMAModel
from torch.utils.data import DataLoader
from tqdm import tqdm

LABELS = "id2label.json"
"""The names of classes, by their numbers."""
INDEX = "model_index.json"
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


def classes(images: datasets.Dataset, model: Path | None) -> tuple[list[int], list[str]]:
    """The number in the network of each class of the data set, and the names by number.

    Classes that the model knows keep their numbers; where some are new, all are counted anew.
    """
    names = images.features["label"].names
    known = json.loads((model / LABELS).read_text()) if model and (model / LABELS).exists() else {}
    numbers = {name: int(number) for number, name in known.items()}
    if all(name in numbers for name in names):
        return [numbers[name] for name in names], sorted(numbers, key=lambda name: numbers[name])
    return list(range(len(names))), names


@dataclasses.dataclass(frozen=True)
class Collate:
    """Rows of a data set to images (N, C, H, W) in [-1, 1] and classes (N,)."""

    channels: int
    side: int
    numbers: list[int]

    def __call__(self, rows: list[dict[str, object]]) -> tuple[torch.Tensor, torch.Tensor]:
        pictures = [
            row["image"]
            .convert("L" if self.channels == 1 else "RGB")
            .resize((self.side, self.side))
            for row in rows
        ]
        pixels = np.stack([np.atleast_3d(np.asarray(picture)) for picture in pictures])
        images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
        return images, torch.tensor([self.numbers[row["label"]] for row in rows])


def encoder(vae: AutoencoderKL | None) -> Callable[[torch.Tensor], torch.Tensor]:
    """Images to what the network sees."""
    if vae is None:
        return lambda images: images

    @torch.no_grad()
    def encode(images: torch.Tensor) -> torch.Tensor:
        latents = vae.encode(images).latent_dist.sample()
        return (latents - (vae.config.shift_factor or 0)) * vae.config.scaling_factor

    return encode


def loss_of(
    network: torch.nn.Module, noise: DDPMScheduler, clean: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    drawn = torch.randn_like(clean)
    timesteps = torch.randint(noise.config.num_train_timesteps, labels.shape).to(clean.device)
    target = drawn
    if noise.config.prediction_type == "v_prediction":
        target = noise.get_velocity(clean, drawn, timesteps)
    predicted = network(noise.add_noise(clean, drawn, timesteps), timesteps, labels).sample
    return F.mse_loss(predicted.float(), target)


def save(
    network: DiTTransformer2DModel,
    noise: DDPMScheduler,
    vae: AutoencoderKL | None,
    names: list[str],
    out: Path,
) -> None:
    for block in network.transformer_blocks:  # a copy in each, as diffusers keeps them
        block.norm1.emb = copy.deepcopy(block.norm1.emb)
    scheduler = DDIMScheduler.from_config(noise.config, timestep_spacing="trailing")
    labels = dict(enumerate(names))
    if vae is None:
        network.save_pretrained(out / "transformer")
        scheduler.save_pretrained(out / "scheduler")
    else:
        DiTPipeline(network, vae, scheduler).save_pretrained(out)
        index = json.loads((out / INDEX).read_text())
        (out / INDEX).write_text(json.dumps(index | {"id2label": labels}))
    (out / LABELS).write_text(json.dumps(labels))


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
    vae = None
    if options.model and (options.model / "vae").is_dir():  # a model of latents
        vae = AutoencoderKL.from_pretrained(options.model, subfolder="vae").to(accelerator.device)
    scale = 1 if vae is None else 2 ** (len(vae.config.block_out_channels) - 1)
    numbers, names = classes(images, options.model)
    blocks = network.transformer_blocks
    for block in blocks:  # one embedder for all blocks, as DiT has it
        block.norm1.emb = blocks[0].norm1.emb
    network.eval()  # else diffusers' blocks drop labels, too, and each block others
    encode = encoder(vae)

    null_class = network.config.num_embeds_ada_norm
    if len(names) > null_class:
        raise SystemExit(f"{len(names)} classes are more than the model's {null_class}")
    if len(images) < options.batch_size:
        raise SystemExit(f"{len(images)} images are less than one batch: lower --batch-size")
    channels = (network if vae is None else vae).config.in_channels
    collate = Collate(channels, network.config.sample_size * scale, numbers)
    loader = DataLoader(
        images, options.batch_size, shuffle=True, drop_last=True, collate_fn=collate
    )
    optimizer = torch.optim.AdamW(network.parameters(), options.learning_rate, weight_decay=0.0)
    # not prepared: accelerate would take a step of it for every process
    schedule = get_cosine_schedule_with_warmup(optimizer, options.steps // 20, options.steps)
    network, optimizer, loader = accelerator.prepare(network, optimizer, loader)
    average = EMAModel(network.parameters(), decay=options.ema_decay, use_ema_warmup=True)
    average.to(accelerator.device)
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    progress = tqdm(range(options.steps), disable=not accelerator.is_main_process)
    for _, (pictures, labels) in zip(progress, batches, strict=False):
        clean = encode(pictures)
        dropped = torch.rand(labels.shape, device=labels.device) < options.null_probability
        loss = loss_of(network, noise, clean, labels.masked_fill(dropped, null_class))
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
        save(network, noise, vae, names, options.out)


if __name__ == "__main__":
    main()
