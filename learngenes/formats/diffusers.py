"""Export to plain diffusers: a `DiTTransformer2DModel` with its weights written out."""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import diffusers
import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor, nn

from learngenes.config import Kind, Mode, NetworkConfig, Scheduler
from learngenes.data.latents import joined
from learngenes.family.family import Family
from learngenes.model.dit import DiT
from learngenes.model.factors import Own
from learngenes.model.schedulers import diffusers_scheduler

LABELS = "id2label.json"
GUIDE = "guide"
PIPELINE_NULL_CLASS = 1000
"""Class that `DiTPipeline` guides away from, whatever number of classes the network has."""
EMBEDDER = "norm1.emb"
"""Name of the time and class embedder in a block."""
LINEARS = {
    Kind.QKV: ("attn1.to_q", "attn1.to_k", "attn1.to_v"),
    Kind.O: ("attn1.to_out.0",),
    Kind.IN: ("ff.net.0.proj",),
    Kind.OUT: ("ff.net.2",),
    Kind.ADALN: ("norm1.linear",),
}
"""Names of the linear layers in a block that make up each of ours."""


def export_model(
    family: Family,
    own: Own,
    directory: Path,
    class_names: Sequence[str] = (),
    guide: Own | None = None,
) -> None:
    """Write `transformer/` (float32) and `scheduler/` (DDIM), as `DiTPipeline` samples from them,
    the smaller model that guides as `guide/`, and `id2label.json`: the names of the classes, by
    default the family's.

    Of a family of latents the whole pipeline. Raises ValueError when the family has more than 1,000
    classes.
    """
    labels = {
        str(number): name for number, name in enumerate(class_names or family.manifest.class_names)
    }
    _save_network(family, own, directory / "transformer")
    if guide is not None:
        _save_network(family, guide, directory / GUIDE)
    (directory / LABELS).write_text(json.dumps(labels, indent=2) + "\n")
    # the number of steps is the request's, and is not part of a saved scheduler
    scheduler = diffusers_scheduler(family.manifest.diffusion, Scheduler.DDIM, 1)
    scheduler.save_pretrained(directory / "scheduler")
    if family.encoder is not None:
        _save_pipeline(family, labels, directory)


def _save_network(family: Family, own: Own, directory: Path) -> None:
    model = family.assemble(own, Mode.MATERIALISED)
    config = diffusers_config(model.config, len(model.layers))
    config["num_embeds_ada_norm"] = PIPELINE_NULL_CLASS
    network = DiTTransformer2DModel(**config)
    state = diffusers_state(model)
    for name, tensor in state.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            state[name] = _pipeline_classes(tensor)
    network.load_state_dict(state)
    network.save_pretrained(directory)


def _save_pipeline(family: Family, labels: Mapping[str, str], directory: Path) -> None:
    assert family.encoder is not None
    assert family.stem.decoder is not None
    whole = joined(family.manifest.network, family.encoder, family.stem.decoder)
    whole.save_pretrained(directory / "vae")
    index = {
        "_class_name": "DiTPipeline",
        "_diffusers_version": diffusers.__version__,
        "id2label": labels,
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (directory / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def diffusers_config(config: NetworkConfig, depth: int) -> dict[str, object]:
    """Arguments of `DiTTransformer2DModel` for a network of `depth` layers."""
    return {
        "num_attention_heads": config.num_attention_heads,
        "attention_head_dim": config.width // config.num_attention_heads,
        "in_channels": config.in_channels,
        "out_channels": config.in_channels,
        "num_layers": depth,
        "sample_size": config.sample_size,
        "patch_size": config.patch_size,
        "num_embeds_ada_norm": config.num_classes,
        "norm_elementwise_affine": False,
        "norm_eps": 1e-5,
    }


def to_diffusers(model: DiT) -> DiTTransformer2DModel:
    """A diffusers model that computes what `model`, in materialised mode, computes."""
    network = DiTTransformer2DModel(**diffusers_config(model.config, len(model.layers)))
    network.load_state_dict(diffusers_state(model))
    return network.eval()


def diffusers_state(model: DiT) -> dict[str, Tensor]:
    """`model`'s weights under diffusers' names. Raises ValueError when it is not materialised."""
    stem = model.stem
    modules: dict[str, nn.Module] = {
        "pos_embed.proj": stem.patch,
        "proj_out_1": stem.final_modulation,
        "proj_out_2": stem.final,
    }
    state = {}
    for index, layer in enumerate(model.layers):
        weights = layer.state_dict()
        if f"{Kind.QKV}.weight" not in weights:
            raise ValueError(f"export needs a {Mode.MATERIALISED} model")
        block = f"transformer_blocks.{index}"
        for kind, part in itertools.product(Kind, ("weight", "bias")):
            tensors = weights[f"{kind}.{part}"].chunk(len(LINEARS[kind]))
            for name, tensor in zip(LINEARS[kind], tensors, strict=True):
                state[f"{block}.{name}.{part}"] = tensor
        modules[f"{block}.{EMBEDDER}.timestep_embedder.linear_1"] = stem.time_in
        modules[f"{block}.{EMBEDDER}.timestep_embedder.linear_2"] = stem.time_out
        modules[f"{block}.{EMBEDDER}.class_embedder.embedding_table"] = stem.classes
    for prefix, module in modules.items():
        state |= {f"{prefix}.{name}": tensor for name, tensor in module.state_dict().items()}
    return state


def _pipeline_classes(classes: Tensor) -> Tensor:
    """Class table (num_classes + 1, D) -> (1001, D): the null class, our last row, is row 1000."""
    num_classes = len(classes) - 1
    if num_classes > PIPELINE_NULL_CLASS:
        raise ValueError(f"DiTPipeline knows {PIPELINE_NULL_CLASS} classes, not {num_classes}")
    unused = classes.new_zeros(PIPELINE_NULL_CLASS - num_classes, classes.shape[1])
    return torch.cat([classes[:-1], unused, classes[-1:]])
