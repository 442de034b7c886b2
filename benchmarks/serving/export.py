"""A fineserve model as a directory that diffusers' own `DiTPipeline` samples from."""

from pathlib import Path

import torch
from diffusers import DiTTransformer2DModel
from torch import Tensor

from learngenes.config import Mode
from learngenes.diffusion import sampler
from learngenes.export import diffusers_config, to_diffusers
from learngenes.factors import Scales
from learngenes.family import Family

PIPELINE_NULL_CLASS = 1000
"""`DiTPipeline` guides away from this class, whatever number of classes the network has."""


def export_model(family: Family, scales: Scales, directory: Path) -> None:
    """Write `transformer/` (float32, W written out) and `scheduler/` (DDIM) into `directory`.

    Raises ValueError when the family has more than 1,000 classes.
    """
    model = family.assemble(scales, Mode.MATERIALISED)
    config = diffusers_config(model.config, len(model.layers))
    config["num_embeds_ada_norm"] = PIPELINE_NULL_CLASS
    network = DiTTransformer2DModel(**config)
    state = to_diffusers(model).state_dict()
    for name, tensor in state.items():
        if name.endswith("class_embedder.embedding_table.weight"):
            state[name] = pipeline_classes(tensor)
    network.load_state_dict(state)
    network.save_pretrained(directory / "transformer")
    # the number of steps is the request's, and is not part of a saved scheduler
    sampler(family.manifest.diffusion, "ddim", 1).save_pretrained(directory / "scheduler")


def pipeline_classes(classes: Tensor) -> Tensor:
    """(num_classes + 1, D) -> (1001, D): the null class, our last row, becomes row 1000.

    The rows between are never asked for.
    """
    num_classes = len(classes) - 1
    if num_classes > PIPELINE_NULL_CLASS:
        raise ValueError(f"DiTPipeline knows {PIPELINE_NULL_CLASS} classes, not {num_classes}")
    table = torch.zeros(PIPELINE_NULL_CLASS + 1, classes.shape[1], dtype=classes.dtype)
    table[:num_classes] = classes[:-1]
    table[PIPELINE_NULL_CLASS] = classes[-1]
    return table
