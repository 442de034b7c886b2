"""Import from diffusers: a DiT of theirs as one of our networks, which condensation starts from."""

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import structlog
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from pydantic import ValidationError
from torch import Tensor, nn

from learngenes.config import DiffusionConfig, NetworkConfig
from learngenes.data.latents import LatentEncoder, read_autoencoder
from learngenes.formats.diffusers import EMBEDDER, LINEARS
from learngenes.model.dense import DenseDiT, Weights
from learngenes.model.diffusion import noise_process
from learngenes.model.dit import Stem

log = structlog.get_logger()

SCHEDULER = "scheduler/scheduler_config.json"
KINDS = ("*.json", "*.safetensors")
NEEDED_FILES = [
    # of a pipeline, or of a transformer alone; weights in other formats are code
    *(f"{folder}{kind}" for folder in ("", "scheduler/", "transformer/", "vae/") for kind in KINDS)
]
REVISION = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)@(?P<commit>[0-9a-f]{40})")
"""A name on the hub, and the commit that is meant: names alone may be of anything tomorrow."""
REQUIRED = {
    "norm_type": "ada_norm_zero",
    "activation_fn": "gelu-approximate",
    "attention_bias": True,
    "norm_elementwise_affine": False,
    "norm_eps": 1e-5,
}
"""Settings that a DiT's configuration must have, as that of DiT-XL/2 does."""


class TeacherError(ValueError):
    """This DiT cannot be condensed; the message says why."""


@dataclass(frozen=True)
class Teacher:
    network: DenseDiT
    """Network that computes what diffusers' does; of mean and variance, the mean alone."""
    diffusion: DiffusionConfig | None
    """Noise process; None where no scheduler lies beside the network."""
    autoencoder: Path | None = None
    """Encoder of a network of latents; the decoder is in its stem."""
    encoder: LatentEncoder | None = None
    class_names: tuple[str, ...] | None = None
    """Class names in order of their numbers; None where no pipeline's index has them."""

    def with_classes(self, names: Sequence[str]) -> "Teacher":
        """This teacher with only the named classes, in that order, and the null class.

        By their names, where it knows those; else the first ones. Raises TeacherError.
        """
        stem = self.network.stem
        table = stem.classes.weight
        numbers = list(range(len(names)))
        if self.class_names is not None:
            if unknown := [name for name in names if name not in self.class_names]:
                raise TeacherError(
                    f"the teacher has no class {unknown[0]!r}; name the data's classes as its "
                    "model_index.json does"
                )
            numbers = [self.class_names.index(name) for name in names]
        if max(numbers) >= len(table) - 1:
            raise TeacherError(f"the teacher knows {len(table) - 1} classes, not {len(names)}")
        chosen = stem.with_classes(torch.cat([table[numbers], table[-1:]]))
        network = DenseDiT(chosen, self.network.weights()).eval().requires_grad_(False)
        return dataclasses.replace(self, network=network)


def read_teacher(source: str) -> Teacher:
    """Load a directory of a `DiTPipeline` or of its transformer, or NAME@COMMIT on the hub.

    Raises TeacherError, and AutoencoderError for a `vae/` beside it that cannot be taken over.
    """
    path = Path(source)
    try:
        if not path.exists():
            if (pinned := REVISION.fullmatch(source)) is None:
                raise TeacherError(
                    f"{source} is no directory here; of the hub, name the commit as well: "
                    f"{source.partition('@')[0]}@COMMIT, with its 40 digits"
                )
            found = snapshot_download(
                pinned["name"], revision=pinned["commit"], allow_patterns=NEEDED_FILES
            )
            path = Path(found)
        subfolder = None if (path / "config.json").exists() else "transformer"
        network = DiTTransformer2DModel.from_pretrained(
            path, subfolder=subfolder, use_safetensors=True
        )
        ours = from_diffusers(network)
    except (HFValidationError, HfHubHTTPError, OSError, ValidationError) as error:
        raise TeacherError(f"{source} is not a DiT that diffusers loads: {error}") from error
    beside = path if subfolder else path.parent
    teacher = Teacher(ours, _diffusion(beside), class_names=_class_names(beside))
    if not (beside / "vae").is_dir():
        return teacher
    shape, encoder, decoder = read_autoencoder(beside / "vae", ours.config)
    ours.config = ours.stem.config = shape
    ours.stem.decoder = decoder
    return dataclasses.replace(teacher, autoencoder=beside / "vae", encoder=encoder)


@torch.no_grad()
def from_diffusers(network: DiTTransformer2DModel) -> DenseDiT:
    """One of our networks that computes what diffusers' does. Raises TeacherError."""
    config = network.config
    for name, wanted in REQUIRED.items():
        if config[name] != wanted:
            raise TeacherError(f"its {name} is {config[name]!r}; only {wanted!r} can be condensed")
    state: dict[str, Tensor] = {k: v.float() for k, v in network.state_dict().items()}
    width = config.num_attention_heads * config.attention_head_dim
    shape = NetworkConfig(
        sample_size=config.sample_size,
        in_channels=config.in_channels,
        patch_size=config.patch_size,
        width=width,
        num_attention_heads=config.num_attention_heads,
        num_classes=config.num_embeds_ada_norm,
        depth=config.num_layers,
        rank=width,
    )
    _warn_of_embedders(state, config.num_layers)
    stem = Stem(shape)
    embedder = f"transformer_blocks.0.{EMBEDDER}"
    for ours, theirs in (
        (stem.patch, "pos_embed.proj"),
        (stem.time_in, f"{embedder}.timestep_embedder.linear_1"),
        (stem.time_out, f"{embedder}.timestep_embedder.linear_2"),
        (stem.final_modulation, "proj_out_1"),
    ):
        _copy(ours, state[f"{theirs}.weight"], state[f"{theirs}.bias"])
    stem.classes.weight.copy_(state[f"{embedder}.class_embedder.embedding_table.weight"])
    _copy(stem.final, *(_mean(state[f"proj_out_2.{part}"], shape) for part in ("weight", "bias")))
    stem.positions.copy_(network.pos_embed.pos_embed[0])
    layers = [_layer(state, f"transformer_blocks.{i}") for i in range(config.num_layers)]
    return DenseDiT(stem, layers).eval().requires_grad_(False)


def _copy(linear: nn.Module, weight: Tensor, bias: Tensor) -> None:
    linear.load_state_dict({"weight": weight, "bias": bias})


def _layer(state: Mapping[str, Tensor], block: str) -> Weights:
    def joined(names: Sequence[str], part: str) -> Tensor:
        return torch.cat([state[f"{block}.{name}.{part}"] for name in names])

    return {
        kind: (joined(names, "weight"), joined(names, "bias")) for kind, names in LINEARS.items()
    }


def _mean(rows: Tensor, shape: NetworkConfig) -> Tensor:
    """Rows (P, P, out_channels) of the final layer that predict the mean, not the variance."""
    patch = shape.patch_size
    channels = len(rows) // patch**2
    kept = rows.view(patch, patch, channels, -1)[:, :, : shape.in_channels]
    return kept.reshape(shape.patch_values, *rows.shape[1:])


def _warn_of_embedders(state: Mapping[str, Tensor], depth: int) -> None:
    first = f"transformer_blocks.0.{EMBEDDER}."
    furthest = max(
        float((state[k.replace(".0.", f".{i}.", 1)] - v).norm() / v.norm().clamp(min=1e-12))
        for k, v in state.items()
        if k.startswith(first)
        for i in range(depth)
    )
    if furthest > 1e-6:
        log.warning("the blocks' embedders differ; the first block's is taken", by=furthest)


def _diffusion(pipeline: Path) -> DiffusionConfig | None:
    """Noise process of a scheduler. Raises TeacherError when no family can have it."""
    if not (pipeline / SCHEDULER).exists():
        return None
    try:
        theirs = DDPMScheduler.from_pretrained(pipeline, subfolder="scheduler")
        known = {name: theirs.config[name] for name in DiffusionConfig.model_fields}
        ours = DiffusionConfig.model_validate(known)
    except (NotImplementedError, ValueError) as error:
        raise TeacherError(f"{pipeline / SCHEDULER} cannot be taken over: {error}") from error
    if not torch.allclose(noise_process(ours).alphas_cumprod, theirs.alphas_cumprod):
        raise TeacherError(
            f"{pipeline / SCHEDULER} cannot be taken over: its betas are not those that diffusers "
            f"has for {ours.beta_schedule}"
        )
    return ours


def _class_names(pipeline: Path) -> tuple[str, ...] | None:
    index = pipeline / "model_index.json"
    labels = json.loads(index.read_text()).get("id2label") if index.exists() else None
    if not labels:
        return None
    return tuple(name for _, name in sorted(labels.items(), key=lambda item: int(item[0])))
