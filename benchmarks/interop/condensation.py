"""Check 2: a dense teacher, trained with diffusers' own classes, and what is made of it.

At the scale of the paper's tables (`benchmarks/paper/PROTOCOL.md`), and judged as there.
"""

import copy
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import datasets
from safetensors.torch import load_file, save_file

from benchmarks.paper.lab import Lab
from benchmarks.paper.methods import pruned, train_all, written_out
from benchmarks.paper.run import make_lab
from benchmarks.paper.setting import REFERENCE, Setting
from benchmarks.paper.training import denoising_loss
from benchmarks.parts import REPOSITORY, Figures
from learngenes.config import Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family, load_family
from learngenes.formats.teacher import read_teacher
from learngenes.model.dense import DenseDiT
from learngenes.model.factors import Scales
from learngenes.training.condense import REPORT, condense
from learngenes.training.retrain import RetrainingConfig, retrain

TRAIN = REPOSITORY / "examples" / "train_diffusers.py"
TEACHER_LEARNING_RATE = 5e-3
PRUNED_LEARNING_RATES = (3e-3, 1e-2)
"""The best of them counts. Those of the distillation were chosen of four, after 500 steps, when the
first had diverged; so was the fit's ridge."""
CONFIG = """
name = "condensed"
rank = {rank}
[data]
path = "{path}"
licence = "{licence}"
[sizes]
depths = {depths}
ranks = {ranks}
[training]
steps = {steps}
batch_size = {batch}
learning_rate = 1e-3
sigma_learning_rate = 3e-3
factor_learning_rate = 1e-2
"""


def measure(setting: Setting = REFERENCE, steps: int = 2500) -> Figures:
    lab = make_lab(setting, REPOSITORY / "var" / "paper" / setting.name)
    kept = REPOSITORY / "var" / "interop" / setting.name
    work = kept / str(steps)
    work.mkdir(parents=True, exist_ok=True)
    directory = _trained_teacher(lab, kept)
    teacher = read_teacher(str(directory)).network
    config = _config(lab, kept / "data", work, steps)
    family, seconds = _condensed(config, work, directory)
    full, half = setting.network.depth, setting.network.depth // 2
    of_depth = {
        depth: family.scales_of(Size(depth=depth, rank=setting.network.rank))
        for depth in (full, half)
    }
    models = {"teacher": teacher}
    models |= {f"condensed, L{d}": written_out(family, scales) for d, scales in of_depth.items()}
    scales, more_seconds = _retrained(family, of_depth[half])
    retrained, cut = f"condensed, L{half}, Σ retrained", f"pruned, L{half}"
    models[retrained] = written_out(family, scales)
    models[cut], rate = _trained_pruned(lab, work, teacher, half, seconds + more_seconds)
    judged = {name: lab.judge(model) for name, model in models.items()}
    report = json.loads((work / "family" / REPORT).read_text())
    return {
        "judged": judged,
        "fit_error": report["fit_error"],
        "distillation_steps": steps,
        "condense_seconds": round(seconds, 1),
        "retrain_seconds": round(more_seconds, 1),
        "pruned_learning_rate": rate,
        "condense_loss_gap": round(
            judged[f"condensed, L{full}"]["loss"] / judged["teacher"]["loss"] - 1, 4
        ),
        "condense_half_depth_fd": judged[retrained]["fd"],
        "prune_half_depth_fd": judged[cut]["fd"],
    }


def _condensed(config: Path, work: Path, teacher: Path) -> tuple[Family, float]:
    """Family and processor seconds that it took; kept once it is done, else begun again."""
    directory, took = work / "family", work / "condensed.json"
    if took.exists():
        return load_family(directory), json.loads(took.read_text())
    shutil.rmtree(work / "work", ignore_errors=True)
    started = time.process_time()
    family = condense(str(teacher), config, work / "work", directory)
    seconds = time.process_time() - started
    took.write_text(json.dumps(seconds))
    return family, seconds


def _retrained(family: Family, scales: Scales) -> tuple[Scales, float]:
    """Scales retrained as a build does, and the processor seconds that it took."""
    started = time.process_time()
    scales = retrain(family, copy.deepcopy(scales), RetrainingConfig()).scales
    return scales, time.process_time() - started


def _trained_teacher(lab: Lab, kept: Path) -> Path:
    """Directory of the teacher, which is trained once."""
    setting, directory = lab.setting, kept / "teacher"
    dataset = kept / "data"
    if not dataset.exists():
        _save(lab, dataset)
    if not (directory / "scheduler").exists():
        network = setting.network
        shape = {"depth": network.depth, "width": network.width, "patch-size": network.patch_size}
        options = {"steps": setting.ancestor_steps, "learning-rate": TEACHER_LEARNING_RATE, **shape}
        words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
        command = [sys.executable, str(TRAIN), str(dataset), str(directory), *words]
        subprocess.run(command, check=True)
    return directory


def _save(lab: Lab, directory: Path) -> None:
    """The splits of the paper's tables, as a Hugging Face dataset."""

    def split(images: LabelledImages) -> datasets.Dataset:
        names = list(images.class_names)
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=names))
        columns = {"image": list(images.images[:, 0].numpy()), "label": images.labels.tolist()}
        return datasets.Dataset.from_dict(columns, features=features)

    splits = lab.ancestors.splits
    parts = {"train": split(splits.training), "test": split(splits.test)}
    datasets.DatasetDict(parts).save_to_disk(str(directory))


def _config(lab: Lab, images: Path, work: Path, steps: int) -> Path:
    setting = lab.setting
    file = work / "condense.toml"
    file.write_text(
        CONFIG.format(
            rank=setting.network.rank,
            path=images,
            licence="Fashion-MNIST, MIT",
            depths=list(setting.trained_depths),
            ranks=[setting.network.rank],
            steps=steps,
            batch=setting.batch_size,
        )
    )
    return file


def _trained_pruned(
    lab: Lab, work: Path, teacher: DenseDiT, depth: int, seconds: float
) -> tuple[DenseDiT, float]:
    """The teacher without the layers that matter least, trained for as long; and how fast."""
    file = work / f"pruned-L{depth}.safetensors"
    model = pruned(copy.deepcopy(teacher), lab.ancestors, depth)
    if file.exists():
        model.load_state_dict(load_file(file))
        return model, json.loads(file.with_suffix(".json").read_text())
    started = time.process_time()
    train_all(copy.deepcopy(model), lab.ancestors, 50, 0, PRUNED_LEARNING_RATES[0])
    steps = round(50 * seconds / (time.process_time() - started))
    trained = {
        rate: train_all(copy.deepcopy(model), lab.ancestors, steps, 0, rate)
        for rate in PRUNED_LEARNING_RATES
    }
    choosing = lab.ancestors.splits.choosing
    best = min(trained, key=lambda rate: denoising_loss(trained[rate], choosing, lab.setting))
    save_file(trained[best].state_dict(), file)
    file.with_suffix(".json").write_text(json.dumps(best))
    return trained[best], best
