"""Tuning: the brief training on limited data of Sigma retraining and refinement."""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import structlog
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn

from learngenes.config import DType, Frozen, Mode
from learngenes.data.labelled import LabelledImages
from learngenes.device import training_precision
from learngenes.family.family import Family
from learngenes.model.diffusion import (
    Predict,
    heldout_loss,
    noise_process,
    step_generator,
    training_batch,
)
from learngenes.model.factors import Own, Scales
from learngenes.training import checkpoint

log = structlog.get_logger()

CHECKPOINT_SECONDS = 15.0
TIMES_AS_LONG = 10.0
"""Multiple of `max_seconds` after which time ends it in any case."""
Stopped = Literal["converged", "steps", "time", "enough"]


class TuningConfig(Frozen):
    steps: int
    batch_size: int
    learning_rate: float
    max_seconds: float
    least_steps: int = 0
    """Steps before which time does not end it, unless it took TIMES_AS_LONG."""
    heldout_images: int = 200
    """Most held-out images; never more than a fifth of the data."""
    heldout_every_steps: int = 50
    patience: int
    """Held-out losses without a new best one after which it stops."""
    null_class_probability: float = 0.1
    seed: int = 0

    def share(self, step: int, seconds: float) -> float:
        """Share that is done of the steps or the time, whichever is nearer its end."""
        of_time = seconds / self.max_seconds
        if step < self.least_steps:
            of_time = max(min(of_time, step / self.least_steps), of_time / TIMES_AS_LONG)
        return max(step / self.steps, of_time)

    def stopped(self, step: int, stale: int) -> Stopped:
        """What has ended it after `step` steps, with so many held-out losses no better."""
        if stale >= self.patience:
            return "converged"
        return "steps" if step >= self.steps else "time"


class Progress(Frozen):
    """Progress that the callback hears after every step."""

    step: int
    steps: int
    """Expected number of steps in all, at the present pace."""
    loss: float
    heldout_loss: float | None


class Enough(Exception):
    """Raised by the callback to end with the best so far."""


class Pause(Exception):
    """Raised by the callback to stop and go on later from a checkpoint."""


OnProgress = Callable[[Progress], object]


@dataclass(frozen=True)
class Tuned:
    """Result; the model is left as it was at its lowest held-out loss, maybe the start."""

    initial_heldout_loss: float
    heldout_loss: float
    steps: int
    seconds: float
    stopped: Stopped
    """What ended it: no better held-out loss, all its steps, its time, or its caller."""


def split_heldout(data: LabelledImages, most: int) -> tuple[LabelledImages, LabelledImages]:
    """Training data, and at most `most` held-out images, the same ones each time.

    A fifth is held out, at least one image, but never the last image of a class.
    """
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    left = torch.bincount(data.labels).tolist()
    held: list[int] = []
    for index in order.tolist():
        if len(held) >= min(most, max(1, len(data) // 5)):
            break
        label = int(data.labels[index])
        if left[label] > 1:
            left[label] -= 1
            held.append(index)
    taken = torch.tensor(held, dtype=torch.long)
    return data.subset(order[~torch.isin(order, taken)]), data.subset(taken)


def teacher_of(family: Family, own: Own, mode: Mode, dtype: DType) -> Predict | None:
    """The full size, of which a lesser model learns half; None where it knows other classes."""
    full = family.full_own(mode)
    same_rank = not isinstance(own, Scales) or own.rank == family.full_size.rank
    whole = own.depth == full.depth and same_rank and dtype.bits is None
    if whole or own.classes is not None:
        return None
    return family.assemble(full, mode if mode.written_out else Mode.MATERIALISED)


class Tuning:
    def __init__(
        self,
        family: Family,
        model: nn.Module,
        predict: Predict,
        config: TuningConfig,
        data: LabelledImages,
        teacher: Predict | None = None,
        checkpoint_file: Path | None = None,
        optimizer: torch.optim.Optimizer | None = None,
    ) -> None:
        """Train all of `model`, by which `predict` predicts, in place, half from `teacher`.

        By AdamW, or `optimizer`, whose groups may have a `rate`, relative to the learning rate.
        """
        self.family, self.model, self.predict, self.config = family, model, predict, config
        self.teacher, self.checkpoint_file = teacher, checkpoint_file
        self.device = family.stem.positions.device
        model.to(self.device).requires_grad_(True)
        self.process = noise_process(family.manifest.diffusion)
        self.train, held = split_heldout(data, config.heldout_images)
        self.held_images = held.normalised().to(self.device)
        self.held_labels = held.labels.to(self.device)
        self.optimizer = optimizer or torch.optim.AdamW(
            model.parameters(), lr=0.0, weight_decay=0.0
        )
        self.best = copy.deepcopy(model)

    def run(self, on_progress: OnProgress | None) -> Tuned:
        config, loss_before = self.config, self._heldout_loss()
        begun = {"initial": loss_before, "best": loss_before, **self._resume()}
        initial, best = begun["initial"], begun["best"]
        stale, step = int(begun.get("stale", 0)), int(begun.get("step", 0))
        saved = time.monotonic()
        started = saved - begun.get("seconds", 0.0)

        def seconds() -> float:
            return time.monotonic() - started

        def save() -> None:
            done = {"step": step, "seconds": seconds(), "stale": stale}
            self._save({**done, "initial": initial, "best": best})

        def share() -> float:
            return config.share(step, seconds())

        ended, enough = share(), False
        try:
            while ended < 1 and stale < config.patience:
                loss = self._step(
                    step, config.learning_rate * 0.5 * (1 + math.cos(math.pi * ended))
                )
                step += 1
                ended = share()
                heldout = None
                if step % config.heldout_every_steps == 0 or ended >= 1:
                    heldout = self._heldout_loss()
                    stale = 0 if heldout < best else stale + 1
                    if heldout < best:
                        best = heldout
                        self.best.load_state_dict(self.model.state_dict())
                if on_progress is not None:
                    steps = max(step, round(step / ended))
                    on_progress(Progress(step=step, steps=steps, loss=loss, heldout_loss=heldout))
                if time.monotonic() - saved > CHECKPOINT_SECONDS:
                    save()
                    saved = time.monotonic()
        except Enough:
            enough = True
            last = self._heldout_loss()
            if last < best:
                best = last
                self.best.load_state_dict(self.model.state_dict())
        except Pause:
            save()
            raise
        self.model.load_state_dict(self.best.state_dict())
        self.model.requires_grad_(False)
        stopped = "enough" if enough else config.stopped(step, stale)
        if stopped == "time":
            save()  # it may go on
        return Tuned(initial, best, step, seconds(), stopped)

    def _step(self, step: int, learning_rate: float) -> float:
        config = self.config
        generator = step_generator(config.seed, step)
        images, labels = (
            t.to(self.device)
            for t in self.train.drawn(config.batch_size, config.null_class_probability, generator)
        )
        noisy, timesteps, target = training_batch(self.process, images, generator)
        if self.teacher is not None:
            with torch.no_grad(), training_precision(self.device):
                taught = self.teacher(noisy, timesteps, labels).float()
            target = torch.lerp(target, taught, 0.5)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("rate", 1.0)
        loss = F.mse_loss(self.predict(noisy, timesteps, labels), target)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _heldout_loss(self) -> float:
        return heldout_loss(self.predict, self.process, self.held_images, self.held_labels)

    def _save(self, figures: dict[str, float]) -> None:
        if self.checkpoint_file is None:
            return
        try:
            checkpoint.write(self.checkpoint_file, figures, self.model, self.optimizer, self.best)
        except (OSError, SafetensorError) as error:  # what is trained now does not need it
            log.warning("no checkpoint", file=str(self.checkpoint_file), error=str(error))

    def _resume(self) -> dict[str, float]:
        if (file := self.checkpoint_file) is not None:
            try:
                return checkpoint.read(file, self.model, self.optimizer, self.best)
            except (SafetensorError, checkpoint.CheckpointError) as error:
                log.warning("beginning anew", unreadable=str(file), error=str(error))
        return {}
