"""Phase 1: train U, V, the stem and Sigma together, W rebuilt in every step.

The full size alone at first, as the paper has it: its layers learn to differ. Then the order in
which layers can leave is found, greedily, each smaller depth gets a Sigma of its own from the
layers that it keeps, and in the last steps (`depths_from`) a drawn depth is trained beside the full
size, on the same images: it learns what the full size predicts (in-place distillation, arXiv
1903.05134). Drawn from the first step on, small depths teach the layers between to do nothing.

Everything random in step s is drawn from a generator seeded with (seed, s): a run that was
killed resumes from its last checkpoint as if it had not been.
"""

import functools
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import structlog
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, broadcast
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from learngenes.config import NetworkConfig
from learngenes.data import labelled
from learngenes.data.folders import CLASSES_FILE
from learngenes.data.images import DataError
from learngenes.data.latents import LatentEncoder, read_autoencoder
from learngenes.device import default_device, native_bfloat16
from learngenes.family.family import FamilyError, load_family
from learngenes.files import write_file
from learngenes.model.diffusion import (
    Predict,
    heldout_loss,
    noise_process,
    step_generator,
    training_batch,
)
from learngenes.model.sigma import interpolated, subset
from learngenes.training import checkpoint
from learngenes.training.config import PretrainingConfig, TrainingConfig, TrainingError
from learngenes.training.muon import Muon
from learngenes.training.network import FactorisedDiT, compiled_parts, greedy_order, predict

log = structlog.get_logger()

LOG = "log.jsonl"
CHECKPOINT = "checkpoint.safetensors"
CLASSES = "classes.json"
"""Names of the classes in the order of their numbers, which a run that goes on has to have."""
CONFIG = "config.json"
PREPARED = "prepar*-*.safetensors"
"""Files of Sigma that are trained after U and V."""


ORDER_IMAGES = 500
"""Training images that the order of layers is found on."""


def optimizer_of(network: FactorisedDiT, config: TrainingConfig) -> Muon:
    """Optimizer; `peak_lr` of a group is the learning rate at the end of the warm-up."""
    stem = [p for p in network.stem.parameters() if p.requires_grad]  # the decoder is frozen
    owns = [network.scales_of(int(depth)) for depth in network.depths]
    biases = [bias for own in owns for bias in own.bias.parameters()]
    sigmas = [sigma for own in owns for sigma in own.sigma.parameters()]
    groups: list[dict[str, object]] = [
        {"params": [*stem, *biases], "peak_lr": config.learning_rate},
        {"params": sigmas, "peak_lr": config.sigma_learning_rate},
        {
            "params": [*network.genes.parameters()],
            "peak_lr": config.factor_learning_rate,
            "orthogonal": True,
        },
    ]
    return Muon(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0, fused=True)


def learning_rate_share(config: TrainingConfig, step: int) -> float:
    """Share of the learning rates: a linear warm-up, then a linear fall to zero."""
    return min(1.0, (step + 1) / config.warmup_steps) * (1 - step / config.steps)


class Pretraining:
    """One run in one working directory: checkpoints and `log.jsonl` live there."""

    def __init__(
        self,
        config: PretrainingConfig,
        directory: Path,
        start: Path | None = None,
        teacher: nn.Module | None = None,
    ) -> None:
        """Go on with the family `start`; learn from `teacher`, of which the stem is kept as it is.

        Raises FamilyError and DataError.
        """
        self.config, self.directory, self.before = config, directory, Before()
        directory.mkdir(parents=True, exist_ok=True)
        precision = config.training.mixed_precision
        if precision == "auto":
            precision = "bf16" if native_bfloat16(default_device()) else "no"
        self.accelerator = Accelerator(
            mixed_precision=precision,
            kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
        )
        torch.manual_seed(config.training.seed)
        self.encoder: LatentEncoder | None = None
        if config.autoencoder is not None:
            network, self.encoder, decoder = read_autoencoder(config.autoencoder, config.network)
            if config.network.autoencoder is None:
                self.config = config = config.model_copy(update={"network": network})
        self.model = FactorisedDiT(config.network, config.sizes.depths)
        if config.training.compiled:
            self.model.parts = compiled_parts()
        if self.encoder is not None:
            self.model.stem.decoder = decoder
        self.model.stem.requires_grad_(teacher is None)
        self.ema = AveragedModel(
            self.model, multi_avg_fn=get_ema_multi_avg_fn(config.training.ema_decay)
        ).to(self.accelerator.device)
        self.optimizer = optimizer_of(self.model, config.training)
        self._resume()
        if not self.step:
            for stale in directory.glob(PREPARED):  # of other U and V
                stale.unlink()
        if start and not self.step:
            self._begin_from(start)
        self.prepared, self.prepared_optimizer = self.accelerator.prepare(
            self.model, self.optimizer
        )
        self.process = noise_process(config.diffusion)
        self.teacher = None if teacher is None else teacher.to(self.accelerator.device)
        self._load_data()

    def _load_data(self) -> None:
        data, network = self.config.data, self.config.network
        size, device = network.image_size, self.accelerator.device
        self.images = self._encoded(labelled.load(data.path, "train", data.class_names, size))
        if len(self.images.class_names) != network.num_classes:
            raise DataError(
                f"{data.path} has {len(self.images.class_names)} classes, "
                f"the network is for {network.num_classes}"
            )
        self._require_same_classes(self.images.class_names)
        test = labelled.load(data.path, "test", data.class_names, size)
        test = self._encoded(test.balanced(data.heldout_images))
        self.heldout = test.normalised().to(device), test.labels.to(device)

    def _require_same_classes(self, names: Sequence[str]) -> None:
        """Raise DataError where a run that goes on has begun with its classes in another order.

        Until there was this file, folders named by numbers were in the alphabet's order.
        """
        file = self.directory / CLASSES
        begun = list(names)
        if file.exists():
            begun = json.loads(file.read_text())
        elif self.step:
            begun = sorted(names) if all(name.isdecimal() for name in names) else list(names)
        if begun != list(names):
            raise DataError(
                f"this run has begun with the classes {', '.join(begun)}, in that order, and not "
                f"{', '.join(names)}: say the order in {CLASSES_FILE}, or begin in another --work"
            )
        if self.accelerator.is_main_process:
            write_file(file, json.dumps(begun).encode())

    def _encoded(self, images: labelled.LabelledImages) -> labelled.LabelledImages:
        wanted = self.config.network.image_channels
        if images.images.shape[1] != wanted:
            raise DataError(
                f"{self.config.data.path} has images of {images.images.shape[1]} channels, "
                f"the {'autoencoder' if self.encoder else 'network'} is for {wanted}"
            )
        if self.encoder is None:
            return images
        return self.encoder.encoded_once(images, self.directory, self.accelerator.device)

    def run(self) -> FactorisedDiT:
        """Train until `steps`; returns the averaged (EMA) network. Raises TrainingError."""
        training = self.config.training
        quiet = not self.accelerator.is_main_process
        progress = tqdm(total=training.steps, initial=self.step, unit="step", disable=quiet)
        losses: list[float] = []
        while self.step < training.steps:
            losses.append(self.advance())
            progress.update()
            if self.step % training.log_every_steps == 0:
                progress.set_postfix(loss=f"{sum(losses) / len(losses):.4f}")
                self._write_log({"train_loss": sum(losses) / len(losses)})
                losses = []
            if self.step % training.checkpoint_every_steps == 0 or self.step == training.steps:
                self._write_log({"heldout_loss": self.heldout_losses()})
                self._checkpoint()
        progress.close()
        return self.average

    def advance(self) -> float:
        """Train one step; gives its loss. Raises TrainingError where that is not a number."""
        if self.step == self.config.training.depths_from_step and self._smaller_depths:
            self._begin_depths()
        loss = self._train_step()
        if not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step} is {loss}: lower the learning rates in "
                f"the configuration, and remove {CHECKPOINT} and {LOG} in {self.directory}"
            )
        self.step += 1
        return loss

    @property
    def average(self) -> FactorisedDiT:
        """The averaged (EMA) network."""
        network = self.ema.module
        assert isinstance(network, FactorisedDiT)
        return network

    @property
    def batch_of_all(self) -> int:
        """Images of a step of all processes together."""
        processes: int = self.accelerator.num_processes
        return self.config.training.batch_size * processes

    def _train_step(self) -> float:
        training = self.config.training
        first = training.seed * 1_000
        depths = step_generator(first, self.step)
        drawing = step_generator(first + 1, self.step)
        # all processes draw the batch of all, and each takes its part: one of them with that batch
        # would train alike
        images, labels = self.images.drawn(
            self.batch_of_all, training.null_class_probability, drawing
        )
        whole = training_batch(self.process, images.to(self.accelerator.device), drawing)
        part = slice(self.accelerator.process_index, None, self.accelerator.num_processes)
        noisy, timesteps, target = (tensor[part] for tensor in whole)
        labels = labels[part].to(self.accelerator.device)

        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * learning_rate_share(training, self.step)

        def backward(depth: int, wanted: Tensor) -> tuple[Tensor, Tensor]:
            with self.accelerator.autocast():
                prediction = self.prepared(noisy, timesteps, labels, depth)
            loss = F.mse_loss(prediction.float(), wanted)
            self.accelerator.backward(loss)
            return loss.detach(), prediction.detach().float()

        if self.teacher is not None:
            with torch.no_grad(), self.accelerator.autocast():
                taught = self.teacher(noisy, timesteps, labels).float()
            target = torch.lerp(target, taught, training.distillation)
        full = self.config.network.depth
        if self.step < training.depths_from_step or not self._smaller_depths:
            loss, _ = backward(full, target)
        else:
            with self.accelerator.no_sync(self.prepared):  # the second sends both gradients
                loss, prediction = backward(full, target)
            if self.teacher is None:
                target = torch.lerp(target, prediction, training.distillation)
            backward(self._drawn_depth(depths), target)
        self.accelerator.clip_grad_norm_(self.prepared.parameters(), training.clip_norm)
        self.prepared_optimizer.step()
        self.prepared_optimizer.zero_grad()
        self.ema.update_parameters(self.model)
        if self.accelerator.num_processes > 1:  # or one would stop, and the others wait for it
            loss = self.accelerator.reduce(loss, "mean")
        return float(loss)

    @property
    def _smaller_depths(self) -> list[int]:
        full = self.config.network.depth
        return [depth for depth in self.config.sizes.depths if depth < full]

    def _drawn_depth(self, generator: torch.Generator) -> int:
        """A smaller depth; the smallest, which have most to learn, the most often."""
        chances = torch.tensor([1 / depth for depth in self._smaller_depths])
        return self._smaller_depths[int(torch.multinomial(chances, 1, generator=generator))]

    def _begin_depths(self) -> None:
        """Find the order in which layers leave, and let each smaller depth begin from it."""
        chosen = self.images.balanced(max(ORDER_IMAGES, self.config.network.num_classes))
        images, labels = chosen.normalised(), chosen.labels
        device, average = self.accelerator.device, self.average

        def loss(layers: Sequence[int]) -> float:
            kept = subset(average.scales, layers)

            def predicted(x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
                noisy = (x, timesteps, class_labels)
                return predict(average.stem, average.genes, kept, noisy)

            with self.accelerator.autocast():
                return heldout_loss(predicted, self.process, images.to(device), labels.to(device))

        found = torch.tensor(greedy_order(self.config.network.depth, loss), device=device)
        order = broadcast(found).tolist()  # sums may differ in their last bits
        for model in (self.model, average):
            model.begin_depths(order)

    def heldout_losses(self) -> dict[str, float]:
        """Held-out loss of the averaged network at the largest, a middle and the smallest depth."""
        depths, full = self.config.sizes.depths, self.config.network.depth
        watched = [full]
        if self._smaller_depths and self.step > self.config.training.depths_from_step:
            watched += [self.config.sizes.middle.depth, depths[0]]
        return {
            f"L{depth}": self.heldout_loss_of(functools.partial(self.ema, depth=depth))
            for depth in watched
        }

    def heldout_loss_of(self, predict: Predict) -> float:
        with self.accelerator.autocast():
            return heldout_loss(predict, self.process, *self.heldout)

    def _write_log(self, figures: dict[str, object]) -> None:
        if self.accelerator.is_main_process:
            images = self.before.images + self.step * self.batch_of_all
            entry = {"step": self.before.steps + self.step, "images": images, **figures}
            with (self.directory / LOG).open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _forget_log_after(self, step: int) -> None:
        """Drop what was logged between the checkpoint and the kill: it is trained again."""
        log_file = self.directory / LOG
        if self.accelerator.is_main_process and log_file.exists():
            lines = log_file.read_bytes().splitlines(keepends=True)
            write_file(log_file, b"".join(x for x in lines if json.loads(x)["step"] <= step))

    def _checkpoint(self) -> None:
        if self.accelerator.is_main_process:
            before = {"before_steps": self.before.steps, "before_images": self.before.images}
            figures, file = {"step": self.step, **before}, self.directory / CHECKPOINT
            checkpoint.write(file, figures, self.model, self.optimizer, self.ema.module)

    def _require_same_configuration(self) -> None:
        """Raise TrainingError unless the configuration is that with which the run was begun."""
        here = self.config.model_copy(update={"network": _shape(self.config.network)})
        ours = here.model_dump(mode="json")
        for name in ("log_every_steps", "checkpoint_every_steps"):  # of no consequence
            del ours["training"][name]
        file, begun = self.directory / CONFIG, (self.directory / CHECKPOINT).exists()
        before = json.loads(file.read_text()) if begun and file.exists() else ours
        if changed := sorted(_differing(before, ours)):
            raise TrainingError(
                f"{self.directory} holds a training with another configuration (of "
                f"{', '.join(changed)}): choose another directory to work in, or remove "
                f"{CHECKPOINT} and {LOG} there"
            )
        if self.accelerator.is_main_process:
            write_file(file, json.dumps(ours).encode())

    def _resume(self) -> None:
        self._require_same_configuration()
        file = self.directory / CHECKPOINT
        figures = checkpoint.read(file, self.model, self.optimizer, self.ema.module)
        self.step = int(figures.get("step", 0))
        if self.step:
            self.before = Before(int(figures["before_steps"]), int(figures["before_images"]))
            self._forget_log_after(self.before.steps + self.step)
            self.ema.n_averaged.fill_(self.step)
            log.info("resumed", step=self.step, directory=str(self.directory))

    def _begin_from(self, start: Path) -> None:
        """Take over the weights of a family of the same width, at this network's depth."""
        self.before = Before.of(start)
        family = load_family(start)
        theirs, ours = family.manifest.network, self.config.network
        if _shape(theirs.model_copy(update={"depth": ours.depth})) != _shape(ours):
            raise FamilyError(
                f"{start} cannot begin this training: its network is {theirs}, not {ours}; "
                "only the depth may differ"
            )
        scales = interpolated(family.scales, ours.full_size)
        for model in (self.model, self.average):
            model.stem.load_state_dict(family.stem.state_dict())
            model.genes.load_state_dict(family.genes.state_dict())
            model.scales.load_state_dict(scales.state_dict())
        if self.accelerator.is_main_process:
            shutil.copyfile(start / LOG, self.directory / LOG)


def _differing(one: dict[str, Any], other: dict[str, Any], at: str = "") -> Iterator[str]:
    """Names (section.name) of the values in which two configurations differ."""
    for name in one.keys() | other.keys():
        a, b = one.get(name), other.get(name)
        if isinstance(a, dict) and isinstance(b, dict):
            yield from _differing(a, b, f"{at}{name}.")
        elif a != b:
            yield f"{at}{name}"


def _shape(network: NetworkConfig) -> NetworkConfig:
    """Shape of a network, without what was measured of it on some device."""
    if network.autoencoder is None:
        return network
    autoencoder = network.autoencoder.model_copy(update={"decode_bytes": (1,)})
    return network.model_copy(update={"autoencoder": autoencoder})


@dataclass(frozen=True)
class Before:
    """Steps and images that a family had seen before this training went on with it."""

    steps: int = 0
    images: int = 0

    @classmethod
    def of(cls, family: Path) -> "Before":
        """Read it from a family. Raises FamilyError when the family does not tell."""
        try:
            last = json.loads((family / LOG).read_text().splitlines()[-1])
            return cls(last["step"], last["images"])
        except (OSError, IndexError, KeyError, ValueError) as error:
            raise FamilyError(
                f"{family / LOG} does not tell the steps and images of that family, so it cannot "
                "be gone on with; name another, or leave --start out"
            ) from error
