"""One way to train for every method; see PROTOCOL.md."""

import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from benchmarks.paper.setting import Setting
from learngenes.data.labelled import LabelledImages
from learngenes.device import training_precision
from learngenes.model.diffusion import (
    Predict,
    heldout_loss,
    noise_process,
    step_generator,
    training_batch,
)
from learngenes.training import checkpoint
from learngenes.training.muon import Muon

NULL_CLASS_PROBABILITY = 0.1
CHECKPOINT_EVERY_STEPS = 500
CPU = torch.device("cpu")


def train(
    model: nn.Module,
    images: LabelledImages,
    setting: Setting,
    *,
    steps: int,
    learning_rate: float,
    matrix_learning_rate: float | None = None,
    seed: int,
    warmup_steps: int,
    average_decay: float | None = None,
    checkpoint_file: Path | None = None,
    teacher: Predict | None = None,
    distillation: float = 0.0,
) -> nn.Module:
    """Train all of `model` in place; gives it, or the average of its weights.

    `distillation` is the share of what `teacher` predicts in what is learned.
    `matrix_learning_rate`: Muon's for the layers' matrices; AdamW trains them where it is None.
    Goes on from `checkpoint_file` if it is there. Raises FloatingPointError when it diverges.
    """
    process = noise_process(setting.diffusion)
    optimizer = _optimizer(model, learning_rate, matrix_learning_rate)
    average = None
    if average_decay is not None:
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(average_decay))
    begun = 0
    if checkpoint_file is not None:
        figures = checkpoint.read(checkpoint_file, model, optimizer, average)
        begun = int(figures.get("step", 0))
    for step in range(begun, steps):
        if checkpoint_file is not None and step > begun and step % CHECKPOINT_EVERY_STEPS == 0:
            checkpoint.write(checkpoint_file, {"step": step}, model, optimizer, average)
        generator = step_generator(seed, step)
        indices = torch.randint(len(images), (setting.batch_size,), generator=generator)
        labels = images.labels[indices].clone()
        dropped = torch.rand(len(labels), generator=generator) < NULL_CLASS_PROBABILITY
        labels[dropped] = setting.network.num_classes
        noisy, timesteps, target = training_batch(process, images.normalised(indices), generator)
        for group in optimizer.param_groups:
            cosine = 0.5 * (1 + math.cos(math.pi * step / steps))
            group["lr"] = group["peak_lr"] * min(1, (step + 1) / warmup_steps) * cosine
        with training_precision(CPU):
            prediction = model(noisy, timesteps, labels)
            if teacher is not None and distillation > 0:
                with torch.no_grad():
                    taught = teacher(noisy, timesteps, labels).float()
                target = torch.lerp(target, taught, distillation)
        loss = F.mse_loss(prediction.float(), target)
        if not loss.isfinite():
            raise FloatingPointError(f"the loss is {loss.item()} at step {step}")
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if average is not None:
            average.update_parameters(model)
    return model if average is None else average.module


def _optimizer(
    model: nn.Module, learning_rate: float, matrix_learning_rate: float | None
) -> torch.optim.Optimizer:
    matrices, rest = [], []
    for name, parameter in model.named_parameters():
        of_a_layer = parameter.ndim == 2 and not name.startswith("stem.")
        by_muon = of_a_layer and matrix_learning_rate is not None
        (matrices if by_muon else rest).append(parameter)
    groups: list[dict[str, Any]] = [
        {"params": rest, "peak_lr": learning_rate},
        {"params": matrices, "peak_lr": matrix_learning_rate, "orthogonal": True},
    ]
    return Muon([g for g in groups if g["params"]], lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)


def denoising_loss(model: Predict, images: LabelledImages, setting: Setting) -> float:
    process = noise_process(setting.diffusion)
    with training_precision(CPU):
        return heldout_loss(
            model, process, images.normalised(torch.arange(len(images))), images.labels
        )
