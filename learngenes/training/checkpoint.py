"""Checkpoints: all that a killed training needs to go on, as one safetensors file.

`Accelerator.save_state` pickles the optimizer (`safe_serialization` is for models alone), and so
does torch.distributed.checkpoint with its metadata; here nothing is unpickled.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from learngenes.files import replaced


class CheckpointError(ValueError):
    """A checkpoint is of another network, or of an earlier release."""


def write(
    path: Path,
    figures: Mapping[str, float],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> None:
    """Write network, average, optimizer state and progress; the file appears whole."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"optimizer.{key}.{name}": value for key, value in state.items()}
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with replaced(path) as new:
        save_file(tensors, new, metadata={key: repr(value) for key, value in figures.items()})


def read(
    path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, average: nn.Module | None = None
) -> dict[str, float]:
    """Fill in what was written; returns its figures, none where there is no file.

    Raises CheckpointError, with nothing filled in, where its parameters are not those of `model`.
    """
    if not path.exists():
        return {}
    tensors = load_file(path)
    if _under(tensors, "model.").keys() != model.state_dict().keys():
        raise CheckpointError(f"{path} has other parameters than this network: remove it")
    model.load_state_dict(_under(tensors, "model."))
    if average is not None:
        average.load_state_dict(_under(tensors, "average."))
    parameters = dict(model.named_parameters())
    for place, state in _under(tensors, "optimizer.").items():
        key, _, name = place.partition(".")
        parameter = parameters[name]
        # AdamW keeps its number of steps on the CPU
        optimizer.state[parameter][key] = state if key == "step" else state.to(parameter.device)
    with safe_open(path, "pt") as file:
        return {key: float(value) for key, value in file.metadata().items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
