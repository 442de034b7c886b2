"""Condensation of a trained DiT: its import, a CP fit of its stacked weights, distillation.

The layers' W of a kind, stacked (L, m, n), with U and V that all layers share and a diagonal for
each, are a canonical polyadic decomposition: W[l] = sum over r of sigma[l, r] u_r v_r^T
(Kolda and Bader, SIAM Review 51, 2009).
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tensorly
import torch
from accelerate import PartialState
from safetensors.torch import load_file, save_file
from tensorly.cp_tensor import CPTensor
from tensorly.decomposition import parafac
from torch import Tensor
from tqdm import tqdm

from learngenes.config import Kind, NetworkConfig
from learngenes.data import labelled
from learngenes.data.images import DataError
from learngenes.data.latents import digest
from learngenes.device import default_device
from learngenes.family.family import (
    IMPORTED,
    MANIFEST,
    Family,
    load_family,
    save_family,
    write_quality,
)
from learngenes.files import replaced
from learngenes.formats.teacher import Teacher, TeacherError, read_teacher
from learngenes.model.dense import DenseDiT
from learngenes.model.factors import Learngenes, Scales
from learngenes.training.config import CondensationConfig, PretrainingConfig
from learngenes.training.imported import import_dense
from learngenes.training.new_family import write_family
from learngenes.training.pretrain import LOG, Pretraining

REPORT = "condensation.json"
IMPORT_OF = "import.sha256"
"""File with the digest of what was imported."""
IMPORT_FILES = (IMPORT_OF, f"{IMPORTED}.safetensors")
RIDGE = 0.1
"""Ridge of a factor's normal equations, relative to the first guess's V.

Without it components almost cancel each other (Sigma up to 50 instead of 10, with the same error),
and training diverges."""
OnIteration = Callable[[], object]
"""Callback after every iteration of a fit."""
Components = tuple[Tensor | None, Sequence[Tensor]]
"""TensorLy's weights and factors (Sigma, U and V)."""


@dataclass(frozen=True)
class Fit:
    """Fit W[l] ~ u diag(sigma[l]) v^T, the most important components first."""

    u: Tensor
    """U, (m, r)."""
    v: Tensor
    """V, (n, r)."""
    sigma: Tensor
    """Sigma of each layer, (L, r)."""
    error: float
    """Error of all W together, relative to their norm."""

    def save(self, file: Path) -> None:
        tensors = {"u": self.u, "v": self.v, "sigma": self.sigma, "error": torch.tensor(self.error)}
        with replaced(file) as new:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, new)

    @classmethod
    def load(cls, file: Path) -> "Fit":
        tensors = load_file(file)
        return cls(**{**tensors, "error": float(tensors["error"])})


@torch.no_grad()
def fit(stack: Tensor, rank: int, iterations: int, on_iteration: OnIteration | None = None) -> Fit:
    """Alternating least squares on `stack` (L, m, n), from the best components of its modes."""

    def mttkrp(stack: Tensor, cp: Components, mode: int) -> Tensor:
        product = _mttkrp(stack, cp, mode)
        if mode == 2 and on_iteration is not None:
            on_iteration()  # a callback of TensorLy's has all of the stack rebuilt: 37 GB
        return product

    with tensorly.backend_context("pytorch", local_threadsafe=True):
        tensorly.tenalg.register_backend_method("unfolding_dot_khatri_rao", mttkrp)
        tensorly.tenalg.use_dynamic_dispatch()
        start = _first_guess(stack, rank)
        ridge = RIDGE * float((start[1].T @ start[1]).diagonal().mean()) ** 2
        _, (sigma, u, v) = parafac(
            stack, rank, n_iter_max=iterations, init=CPTensor((None, start)), l2_reg=ridge, tol=1e-6
        )
    return _ordered(stack, sigma, u, v)


def _mttkrp(stack: Tensor, cp: Components, mode: int) -> Tensor:
    """Matricised tensor times Khatri-Rao product, which TensorLy forms: 24 GB for DiT-XL/2."""
    _, (sigma, u, v) = cp
    if mode == 0:
        return torch.stack([(w @ v).mul_(u).sum(0) for w in stack])
    if mode == 1:
        return torch.stack([w @ (v * s) for w, s in zip(stack, sigma, strict=True)]).sum(0)
    return torch.stack([w.T @ (u * s) for w, s in zip(stack, sigma, strict=True)]).sum(0)


def _first_guess(stack: Tensor, rank: int) -> list[Tensor]:
    """Sigma (L, r), U (m, r) and V (n, r) from the singular vectors of the stack's own modes.

    W[l] is a sum of L matrices E_i, as much as a[l, i]; each E_i is a sum of outer products.
    Those that weigh most are taken.
    """
    layers, m, n = stack.shape
    flat, most = stack.flatten(1), min(m, n)
    enough = min(layers, math.ceil(rank / most) + 1)
    modes = torch.linalg.eigh(flat @ flat.T).eigenvectors.flip(1)[:, :enough]  # (L, E)
    matrices = (modes.T @ flat).view(enough, m, n)
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    order = values.flatten().argsort(descending=True)[:rank]
    sigma = modes[:, order // most] * values.flatten()[order]
    u, v = left.transpose(1, 2).reshape(-1, m)[order].T, right.reshape(-1, n)[order].T
    if spare := rank - len(order):  # more than these modes have: small and random
        generator = torch.Generator(stack.device).manual_seed(0)
        small = float(sigma.norm(dim=0).min())

        def extended(factor: Tensor, scale: float) -> Tensor:
            shape = len(factor), spare
            drawn = torch.randn(shape, generator=generator, device=stack.device)
            return torch.cat([factor, scale * drawn / len(factor) ** 0.5], dim=1)

        sigma, u, v = extended(sigma, small), extended(u, 1), extended(v, 1)
    return [sigma, u, v]


def _ordered(stack: Tensor, sigma: Tensor, u: Tensor, v: Tensor) -> Fit:
    """The fit with columns of U and V as long as those that training begins with (`Learngenes`)."""
    (_, m, n), rank = stack.shape, sigma.shape[1]
    std = (2 / ((m + n) * rank)) ** 0.25
    long_u, long_v = (f.norm(dim=0).clamp(min=1e-12) for f in (u, v))
    u, v = u / long_u * (std * m**0.5), v / long_v * (std * n**0.5)
    sigma = sigma * (long_u * long_v) / (std**2 * (m * n) ** 0.5)
    order = sigma.norm(dim=0).argsort(descending=True)
    u, v, sigma = u[:, order], v[:, order], sigma[:, order]
    left = sum(float((w - (u * s) @ v.T).square().sum()) for w, s in zip(stack, sigma, strict=True))
    error = (left / float(stack.square().sum().clamp(min=1e-12))) ** 0.5
    return Fit(u.cpu(), v.cpu(), sigma.cpu(), error)


def fit_all(
    network: DenseDiT, shape: NetworkConfig, iterations: int, kept: Path
) -> tuple[Learngenes, Scales, dict[str, float]]:
    """Learngenes and Sigma of `network`, and the error of each kind's fit; fits stay in `kept`."""
    genes = Learngenes(shape)
    sigma, bias, errors = {}, {}, {}
    layers = network.weights()
    with tqdm(total=len(Kind) * iterations, unit="iteration") as bar:
        for number, kind in enumerate(Kind, start=1):
            bar.set_description(f"fit of {kind}")
            stack = torch.stack([layer[kind][0] for layer in layers])
            file = kept / f"{kind}.safetensors"
            if file.exists():
                found = Fit.load(file)
            else:
                found = fit(stack.to(default_device()), shape.rank, iterations, bar.update)
                found.save(file)
            bar.set_postfix(error=f"{found.error:.4f}", refresh=False)
            bar.update(number * iterations - bar.n)
            genes.u[kind].data, genes.v[kind].data = found.u, found.v
            sigma[kind] = found.sigma
            bias[kind] = torch.stack([layer[kind][1] for layer in layers])
            errors[str(kind)] = round(found.error, 5)
    return genes, Scales(sigma, bias), errors


def condense(
    source: str, config_file: Path, work: Path, directory: Path, *, import_only: bool = False
) -> Family:
    """Import, then fit and distil (or go on with any in `work`) and write to `directory`.

    Once it is imported, after minutes, the family can be served; shared sizes come at the end.
    Raises ConfigError, TeacherError, DataError and TrainingError.
    """
    config = CondensationConfig.read(config_file)
    teacher = read_teacher(source)
    side, chosen = teacher.network.config.image_size, config.data
    images = labelled.load(chosen.path, "train", chosen.class_names, side)
    labelled.load(chosen.path, "test", chosen.class_names, side)  # there is one, or no fit is begun
    if images.images.shape[1] != teacher.network.config.image_channels:
        raise DataError(
            f"{chosen.path} has images of {images.images.shape[1]} channels, the teacher's have "
            f"{teacher.network.config.image_channels}"
        )
    teacher = teacher.with_classes(images.class_names)
    pretraining = distillation(config, teacher)
    work /= _digest(teacher, config)
    processes = PartialState()
    if processes.is_main_process:
        limited = images.balanced(config.data.limited_images)
        if teacher.encoder is not None:
            limited = teacher.encoder.encoded(limited, default_device())
        family = _imported(teacher, limited, pretraining, config, directory)
    processes.wait_for_everyone()
    if import_only:
        return load_family(directory)
    fitted = work / "fitted"
    if processes.is_main_process and not (fitted / MANIFEST).exists():
        write_fitted(teacher, limited, pretraining, config.fit_iterations, fitted)
    processes.wait_for_everyone()
    run = Pretraining(pretraining, work, fitted, teacher.network)
    network = run.run().eval().requires_grad_(False)
    if run.accelerator.is_main_process:
        figures = json.loads((fitted / REPORT).read_text())
        figures |= {"heldout_loss": run.heldout_losses(), "steps": run.step}
        figures["teacher_heldout_loss"] = run.heldout_loss_of(teacher.network)
        network.cpu()
        made = work / "made"
        made.mkdir(exist_ok=True)
        (made / REPORT).write_text(json.dumps(figures, indent=2) + "\n")
        for file in IMPORT_FILES:
            shutil.copyfile(directory / file, made / file)
        order = family.manifest.imported_order
        write_family(run, config_file, network, run.step, made, order)
        assert family.quality is not None
        write_quality(made, family.quality.imported_alone)  # until all is calibrated
        _put(made, directory)
    run.accelerator.wait_for_everyone()
    return load_family(directory)


def _imported(
    teacher: Teacher,
    limited: labelled.LabelledImages,
    pretraining: PretrainingConfig,
    config: CondensationConfig,
    directory: Path,
) -> Family:
    """The family as it was imported before into `directory`, or else imported now."""
    settings = f"{config.sizes} {config.data} {config.order_images} {config.calibration_seconds}"
    made_of = digest(settings, teacher.network.state_dict().values())
    file = directory / IMPORT_OF
    if (directory / MANIFEST).exists() and file.exists() and file.read_text() == made_of:
        family = load_family(directory)
        if family.quality is not None:
            return family
    directory.mkdir(parents=True, exist_ok=True)
    file.write_text(made_of)
    seconds = config.calibration_seconds
    return import_dense(teacher, limited, pretraining, config.order_images, seconds, directory)


def _put(made: Path, directory: Path) -> None:
    """Put a family where another one is, which is served until that moment."""
    new, old = (directory.with_name(f".{directory.name}.{which}") for which in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    shutil.copytree(made, new)
    directory.rename(old)
    new.rename(directory)
    shutil.rmtree(old)


def distillation(config: CondensationConfig, teacher: Teacher) -> PretrainingConfig:
    """Pre-training with the teacher's network. Raises TeacherError without a noise process."""
    diffusion = config.diffusion or teacher.diffusion
    if diffusion is None:
        raise TeacherError(
            "no scheduler lies beside the teacher: say how it was trained, under [diffusion]"
        )
    shared = config.model_dump(include={"name", "data", "sizes", "training"})
    network = teacher.network.config.model_copy(update={"rank": config.rank})
    if config.sizes.depths[-1] > network.depth:
        raise TeacherError(
            f"the teacher has {network.depth} layers, and sizes.depths go up to "
            f"{config.sizes.depths[-1]}: leave the larger ones out"
        )
    return PretrainingConfig(
        **shared, autoencoder=teacher.autoencoder, network=network, diffusion=diffusion
    )


def _digest(teacher: Teacher, config: CondensationConfig) -> str:
    fit_settings = f"{config.rank} {config.fit_iterations}"
    return digest(fit_settings, teacher.network.state_dict().values())[:12]


def write_fitted(
    teacher: Teacher,
    limited: labelled.LabelledImages,
    config: PretrainingConfig,
    iterations: int,
    directory: Path,
) -> None:
    """Write a family whose learngenes are fitted to the teacher and not yet trained."""
    fits = directory.parent / "fits"
    genes, scales, errors = fit_all(teacher.network, config.network, iterations, fits)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / LOG).write_text(json.dumps({"step": 0, "images": 0}) + "\n")
    (directory / REPORT).write_text(json.dumps({"fit_error": errors}) + "\n")
    manifest = config.manifest(limited.class_names, trained_steps=0)
    owns = {scales.depth: scales}
    save_family(directory, manifest, genes, teacher.network.stem, owns, limited, teacher.encoder)
