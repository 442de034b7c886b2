"""Export to ONNX: the network with its weights written out; the caller samples.

torch's exporter changes settings of the whole process while it runs, so a process that does
anything else has it done in one of its own: `export_in_process`.
"""

import logging
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from learngenes.config import DType, Mode, Scheduler
from learngenes.data.latents import LatentDecoder
from learngenes.family.family import Family
from learngenes.formats.diffusers import to_diffusers
from learngenes.formats.native import Model, load_model, save_model
from learngenes.model.dit import DiT
from learngenes.model.factors import Own
from learngenes.model.schedulers import diffusers_scheduler

FILE, DECODER_FILE = "model.onnx", "decoder.onnx"
INPUTS = ("sample", "timestep", "class_labels")
"""Inputs: float32 (N, C, H, W); int64 (N,); int64 (N,), the null class after the last one."""
DECODER_INPUT, DECODER_OUTPUT = "latents", "images"


class ExportError(RuntimeError):
    """The exporter failed; the message has its last words."""


class _Prediction(nn.Module):
    """diffusers' network: ours has a layer named `in`, which torch.export cannot spell."""

    def __init__(self, network: DiT) -> None:
        super().__init__()
        self.network = to_diffusers(network)
        blocks = self.network.transformer_blocks
        for block in blocks:  # one embedder, as ours has, and not a copy of it in each block
            block.norm1.emb = blocks[0].norm1.emb

    def forward(self, sample: Tensor, timestep: Tensor, class_labels: Tensor) -> Tensor:
        prediction: Tensor = self.network(sample, timestep, class_labels, return_dict=False)[0]
        return prediction


def export_in_process(family: Family, own: Own, directory: Path) -> None:
    """Write `model.onnx`, `scheduler/` and, for latents, `decoder.onnx`. Raises ExportError."""
    with tempfile.TemporaryDirectory(prefix="fineserve-onnx-") as native:
        names = family.manifest.class_names
        written = Mode.MATERIALISED, DType.FLOAT32
        save_model(Path(native), family, own, *written, names, whole=True)
        command = [sys.executable, "-m", "learngenes.formats.onnx", native, str(directory)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)  # noqa: S603
    if done.returncode:
        raise ExportError(f"the ONNX export failed: {done.stderr[-500:]}")


def export_onnx(model: Model, directory: Path) -> None:
    """Write `model`, materialised and in float32, into `directory`; in this process."""
    for chatty in ("torch.onnx", "onnxscript", "onnx_ir"):  # of operators that nobody asked for
        logging.getLogger(chatty).setLevel(logging.ERROR)
    config, rows = model.network.config, 2  # one would be taken for the only number of them
    x = torch.zeros(rows, config.in_channels, config.sample_size, config.sample_size)
    timesteps, labels = (torch.zeros(rows, dtype=torch.int64) for _ in range(2))  # never one twice
    network = _Prediction(model.network).eval()
    _export(network, (x, timesteps, labels), directory / FILE, INPUTS, "prediction")
    decoder = model.network.stem.decoder
    if isinstance(decoder, LatentDecoder):
        _export(decoder, (x,), directory / DECODER_FILE, (DECODER_INPUT,), DECODER_OUTPUT)
    scheduler = diffusers_scheduler(model.manifest.diffusion, Scheduler.DDIM, 1)
    scheduler.save_pretrained(directory / "scheduler")


def _export(
    network: nn.Module, given: tuple[Tensor, ...], file: Path, inputs: Sequence[str], output: str
) -> None:
    batch = torch.export.Dim("batch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        torch.onnx.export(
            network,
            given,
            file,
            input_names=inputs,
            output_names=(output,),
            dynamic_shapes=({0: batch},) * len(inputs),
            dynamo=True,
            external_data=True,
            verbose=False,
        )


if __name__ == "__main__":
    export_onnx(load_model(Path(sys.argv[1])), Path(sys.argv[2]))
