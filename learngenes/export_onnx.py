"""A model for ONNX runtimes: its network, weights written out; sampling is for the caller."""

import logging
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from learngenes.config import Mode
from learngenes.diffusion import sampler
from learngenes.export import to_diffusers
from learngenes.factors import Own
from learngenes.family import Family

FILE = "model.onnx"
INPUTS = ("sample", "timestep", "class_labels")
"""float32 (N, C, H, W); int64 (N,); int64 (N,), the null class after the last one."""
OUTPUT = "prediction"


class _Prediction(nn.Module):
    """diffusers' network: ours has a layer named `in`, which torch.export cannot spell."""

    def __init__(self, family: Family, own: Own) -> None:
        super().__init__()
        self.network = to_diffusers(family.assemble(own, Mode.MATERIALISED).cpu())
        blocks = self.network.transformer_blocks
        for block in blocks:  # one embedder, as ours has, and not a copy of it in each block
            block.norm1.emb = blocks[0].norm1.emb

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        prediction: Tensor = self.network(sample, timestep, class_labels, return_dict=False)[0]
        return prediction


def export_onnx(family: Family, own: Own, directory: Path) -> None:
    """Write `model.onnx`, its weights beside it, and `scheduler/` (DDIM) in diffusers' form."""
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):  # of operators that nobody asked for
        logging.getLogger(chatty).setLevel(logging.ERROR)
    network = _Prediction(family, own).eval()
    config = family.manifest.network
    rows = 2  # one row would be taken for the only number of them
    given = (
        torch.zeros(rows, config.in_channels, config.sample_size, config.sample_size),
        torch.zeros(rows, dtype=torch.int64),
        torch.zeros(rows, dtype=torch.int64),
    )
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        torch.onnx.export(
            network,
            given,
            directory / FILE,
            input_names=INPUTS,
            output_names=(OUTPUT,),
            dynamic_shapes=({0: batch},) * len(INPUTS),
            dynamo=True,
            external_data=True,
            verbose=False,
        )
    sampler(family.manifest.diffusion, "ddim", 1).save_pretrained(directory / "scheduler")
