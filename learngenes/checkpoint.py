"""What a training needs to go on after it was killed, as one safetensors file."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
"""Adam's, of each parameter that had a gradient."""


def write(
    path: Path,
    figures: Mapping[str, float],
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> None:
    """Network, average and Adam's moments, and how far it is; the file appears at once."""
    tensors = {f"model.{k}": v for k, v in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{k}": v for k, v in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        tensors |= {f"adam.{key}.{name}": value for key, value in state.items()}
    temporary = path.with_suffix(".tmp")
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, temporary, metadata={key: repr(value) for key, value in figures.items()})
    temporary.replace(path)


def read(
    path: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    average: nn.Module | None = None,
) -> dict[str, float]:
    """Fill in what was written; gives its figures, none where nothing is."""
    if not path.exists():
        return {}
    tensors = load_file(path)
    model.load_state_dict(_under(tensors, "model."))
    if average is not None:
        average.load_state_dict(_under(tensors, "average."))
    moments = {key: _under(tensors, f"adam.{key}.") for key in MOMENTS}
    for name, parameter in model.named_parameters():
        if name in moments["step"]:
            optimizer.state[parameter] = {
                key: moment if key == "step" else moment.to(parameter.device)
                for key, moment in ((key, moments[key][name]) for key in MOMENTS)
            }
    with safe_open(path, "pt") as file:
        return {key: float(value) for key, value in file.metadata().items()}


def _under(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
