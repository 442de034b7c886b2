"""Phase 1 of every method, each trained once and kept in the working directory."""

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar, cast

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.paper.setting import Setting, Splits
from benchmarks.paper.training import train
from learngenes.config import Kind, SizeSpace
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import (
    FINGERPRINTED,
    SCHEMA_VERSION,
    Family,
    FamilyManifest,
    file_sha256,
    load_family,
    write_quality,
)
from learngenes.formats.diffusers import export_model
from learngenes.model.dense import DenseDiT, Weights
from learngenes.model.dit import Stem
from learngenes.model.factors import DenseLayers, Layer
from learngenes.training.calibrate import calibrate
from learngenes.training.condense import condense
from learngenes.training.config import PretrainingConfig, TrainingConfig
from learngenes.training.network import FactorisedDiT
from learngenes.training.new_family import write_family
from learngenes.training.pretrain import Pretraining
from learngenes.training.retrain import RetrainingConfig

M = TypeVar("M", bound=nn.Module)

AVERAGE_DECAY = 0.999
FORMS = ("fixed-depth", "any-size")
"""Forms of FINE's phase 1: the paper's, and that of `fineserve pretrain`."""
OF_ONE_DEPTH = "scales.sigma."
"""How names of kept ancestors begin that were trained when there was one Sigma for all depths."""
SHARED_IS_THERE = "calibrated"
"""Empty file beside an imported family, once all its sizes are calibrated."""
PREPARED = "samples.png"
"""File of a family that is written once its depths are prepared."""
WARMUP_STEPS = 200
DENSE_MATRIX_LEARNING_RATE = 0.02


class LinearDiT(nn.Module):
    """TLEG's ancestor (arXiv 2312.05614): W and bias of layer l are B + l / (L - 1) A."""

    def __init__(self, stem: Stem, start: Weights, depth: int) -> None:
        super().__init__()
        self.stem, self.depth = stem, depth
        self.a = nn.ModuleDict({kind: _linear(*start[kind], times=0) for kind in Kind})
        self.b = nn.ModuleDict({kind: _linear(*start[kind], times=1) for kind in Kind})

    def layers(self, depth: int) -> list[Weights]:
        """Weights of the layers of a model of any depth."""

        def at(position: float, kind: Kind) -> tuple[Tensor, Tensor]:
            a, b = (cast(nn.Linear, layer[kind]) for layer in (self.a, self.b))
            return b.weight + position * a.weight, b.bias + position * a.bias

        return [{kind: at(i / max(1, depth - 1), kind) for kind in Kind} for i in range(depth)]

    def forward(self, x: Tensor, timesteps: Tensor, class_labels: Tensor) -> Tensor:
        prediction: Tensor = self.stem(
            x, timesteps, class_labels, [_layer(weights) for weights in self.layers(self.depth)]
        )
        return prediction


def _linear(weight: Tensor, bias: Tensor, *, times: float) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0])
    with torch.no_grad():
        linear.weight.copy_(weight * times)
        linear.bias.copy_(bias * times)
    return linear


def _layer(weights: Weights) -> Layer:
    def linear(kind: Kind) -> Callable[[Tensor], Tensor]:
        return lambda x: nn.functional.linear(x, *weights[kind])

    return {kind: linear(kind) for kind in Kind}


def random_layer(setting: Setting) -> Weights:
    """Weights as DiT is initialised: Xavier, and zero for adaLN."""
    weights = {}
    for kind in Kind:
        m, n = kind.shape(setting.network.width)
        weight = torch.zeros(m, n)
        if kind is not Kind.ADALN:
            nn.init.xavier_uniform_(weight)
        weights[kind] = weight, torch.zeros(m)
    return weights


@dataclasses.dataclass(frozen=True)
class Ancestors:
    """Trained when they are first asked for, and kept in `directory`."""

    setting: Setting
    splits: Splits
    directory: Path
    work: Path
    """Directory of checkpoints."""

    def dense(self) -> DenseDiT:
        network = self.setting.network

        def begin() -> DenseDiT:
            layers = [random_layer(self.setting) for _ in range(network.depth)]
            return DenseDiT(Stem(network), layers)

        return self._kept("dense", begin)

    def tleg(self) -> LinearDiT:
        network = self.setting.network

        def begin() -> LinearDiT:
            return LinearDiT(Stem(network), random_layer(self.setting), network.depth)

        return self._kept("tleg", begin)

    def fine(self, form: str) -> Family:
        """`form`: one of FORMS."""
        if form == "fixed-depth":
            return self.factorised(form, self.setting.published_rank)
        config = self._pretraining(form, self.setting.network.rank)
        images = self.splits.training
        return trained_family(config, self.work / form, self.directory / f"fine-{form}", images)

    def imported(self) -> Family:
        """The dense ancestor as `fineserve condense` takes it over: its own layers, and shared
        factors that are fitted to them and taught by them; calibrated."""
        setting, directory = self.setting, self.directory / "fine-imported"
        if not (directory / SHARED_IS_THERE).exists():
            rank, file = setting.network.rank, self.work / "import.toml"
            sections = {
                "data": setting.data.model_dump(mode="json"),
                "sizes": {"depths": setting.trained_depths, "ranks": [rank // 4, rank // 2, rank]},
                "training": {
                    "compiled": setting.compiled,
                    "steps": setting.ancestor_steps,
                    "batch_size": setting.batch_size,
                    "warmup_steps": WARMUP_STEPS,
                    "preparation_steps": setting.prepared_steps,
                    "healing_steps": setting.prepared_steps // 2,
                },
            }
            first = {
                "name": "imported",
                "rank": rank,
                "calibration_seconds": setting.preparation_seconds,
            }
            file.write_text(
                _toml(first) + "".join(f"[{s}]\n{_toml(sections[s])}" for s in sections)
            )
            family = condense(str(self.exported()), file, self.work / "import", directory)
            config = RetrainingConfig(steps=setting.calibration_steps)
            write_quality(directory, calibrate(family, config))
            (directory / SHARED_IS_THERE).touch()
        return load_family(directory)

    def exported(self) -> Path:
        """Directory of the dense ancestor as diffusers has it."""
        dense, directory = self.dense(), self.work / "teacher"
        family = dataclasses.replace(self.fine("any-size"), stem=dense.stem)
        directory.mkdir(parents=True, exist_ok=True)
        export_model(family, DenseLayers.of(dense.weights()), directory)
        return directory

    def factorised(self, form: str, rank: int) -> Family:
        """A family whose network alone is kept, nothing prepared; trained if it is not there."""
        config = self._pretraining(form, rank)
        path = self.directory / f"fine-{form}-r{rank}.safetensors"
        if not path.exists():
            pretraining = Pretraining(config, self.work / path.stem)
            pretraining.images = self.splits.training
            save_file(pretraining.run().state_dict(), path)
        tensors = load_file(path)
        earlier = any(name.startswith(OF_ONE_DEPTH) for name in tensors)
        depths = (config.network.depth,) if earlier else config.sizes.depths
        network = FactorisedDiT(config.network, depths).eval().requires_grad_(False)
        network.load_state_dict(_of_all_depths(tensors) if earlier else tensors)
        manifest = {
            **config.manifest(config.data.class_names, config.training.steps),
            "schema_version": SCHEMA_VERSION,
            "sha256": dict.fromkeys(FINGERPRINTED, file_sha256(path)),
            "layer_order": network.layer_order,
        }
        return Family(
            FamilyManifest.model_validate(manifest),
            network.genes,
            network.stem,
            network.trained_depths,
            self.splits.limited,
            quality=None,
        )

    def _kept(self, name: str, begin: Callable[[], M]) -> M:
        with torch.random.fork_rng():  # what a method draws is its own seed's
            torch.manual_seed(0)
            model = begin()
        path = self.directory / f"{name}.safetensors"
        if not path.exists():
            averaged = train(
                model,
                self.splits.training,
                self.setting,
                steps=self.setting.ancestor_steps,
                learning_rate=self.setting.ancestor_learning_rate,
                matrix_learning_rate=DENSE_MATRIX_LEARNING_RATE,
                seed=0,
                warmup_steps=WARMUP_STEPS,
                average_decay=AVERAGE_DECAY,
                checkpoint_file=self.work / f"{name}-checkpoint.safetensors",
            )
            save_file(averaged.state_dict(), path)
        model.load_state_dict(load_file(path))
        return model

    def _pretraining(self, form: str, rank: int) -> PretrainingConfig:
        setting = self.setting
        return PretrainingConfig(
            name=form,
            data=setting.data,
            network=setting.network.model_copy(update={"rank": rank}),
            diffusion=setting.diffusion,
            sizes=SizeSpace(depths=setting.trained_depths, ranks=(rank,)),
            training=TrainingConfig.model_validate(
                {
                    **({"depths_from": 1, "ema_decay": AVERAGE_DECAY} if form == FORMS[0] else {}),
                    "compiled": setting.compiled,
                    "steps": setting.ancestor_steps,
                    "batch_size": setting.batch_size,
                    "warmup_steps": WARMUP_STEPS,
                    "learning_rate": setting.ancestor_learning_rate,
                    "sigma_learning_rate": 3 * setting.ancestor_learning_rate,
                    "preparation_steps": setting.prepared_steps,
                    "healing_steps": 0,
                }
            ),
        )


def _toml(values: dict[str, object]) -> str:
    """Lines of a table whose values JSON and TOML write alike."""
    return "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def trained_family(
    config: PretrainingConfig, work: Path, directory: Path, images: LabelledImages | None = None
) -> Family:
    """Family in `directory`, trained unless it is there; on `images` if any, else on its data."""
    if not (directory / PREPARED).exists():
        run = Pretraining(config, work)
        run.images = run.images if images is None else images
        network = run.run().cpu().eval().requires_grad_(False)
        file = work / "as-given.json"
        file.write_text(config.model_dump_json(indent=2))
        write_family(run, file, network, run.step, directory)
    return load_family(directory)


def _of_all_depths(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the present names; there was one parameter for each layer and kind."""
    layers: dict[str, list[Tensor]] = {}
    for name in sorted(tensors, key=_by_layer):
        if name.startswith("scales."):
            layers.setdefault(name.rpartition(".")[0], []).append(tensors[name])
    depth = len(layers["scales.sigma.qkv"])
    others = {k: tensor for k, tensor in tensors.items() if not k.startswith("scales.")}
    owns = {
        name.replace("scales", f"depths.{depth}", 1): torch.stack(rows)
        for name, rows in layers.items()
    }
    return {**others, **owns, "order": torch.full((depth,), -1)}


def _by_layer(name: str) -> int:
    last = name.rpartition(".")[2]
    return int(last) if last.isdigit() else -1
