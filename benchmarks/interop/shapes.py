"""Check 6: the shapes of DiT-XL/2, random weights: fit, assembly and export; time and memory."""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel

from benchmarks.parts import Figures, say
from learngenes.config import DiffusionConfig, DType, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.device import default_device, process_peak_bytes
from learngenes.family.family import load_family
from learngenes.family.synthetic import DIT_XL_2, DIT_XL_2_SIZES
from learngenes.formats.diffusers import diffusers_config, export_model
from learngenes.formats.native import save_model
from learngenes.formats.teacher import read_teacher
from learngenes.training.condense import write_fitted
from learngenes.training.config import DataConfig, PretrainingConfig, TrainingConfig

ITERATIONS = 5
HALF = Size(depth=14, rank=576)


def measure() -> Figures:
    """Each stage in a process of its own, whose peak is the stage's."""
    with tempfile.TemporaryDirectory(prefix="fineserve-dit-xl-") as directory:
        stages = {}
        for stage in STAGES:
            command = [sys.executable, "-m", "benchmarks.interop.shapes", stage, directory]
            told = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
            stages[stage] = json.loads(told.splitlines()[-1])
            say(f"{stage}:", **stages[stage])
    return {
        "iterations": ITERATIONS,
        "stages": stages,
        "dit_xl_condense_seconds": stages["fit"]["seconds"],
    }


def _teacher(directory: Path) -> None:
    """Write a checkpoint laid out as the published one, variance included."""
    torch.manual_seed(0)
    config = {**diffusers_config(DIT_XL_2, DIT_XL_2.depth), "out_channels": 8}
    DiTTransformer2DModel(**config).save_pretrained(directory / "teacher" / "transformer")
    DDIMScheduler().save_pretrained(directory / "teacher" / "scheduler")


def _fit(directory: Path) -> None:
    teacher = read_teacher(str(directory / "teacher"))
    config = PretrainingConfig(
        name="dit-xl",
        data=DataConfig(path=directory, licence="random numbers", limited_images=10),
        network=DIT_XL_2,
        diffusion=teacher.diffusion or DiffusionConfig(),
        sizes=DIT_XL_2_SIZES,
        training=TrainingConfig(steps=1),
    )
    names = tuple(str(i) for i in range(DIT_XL_2.num_classes))
    images = LabelledImages(
        torch.zeros(1000, 4, 32, 32, dtype=torch.uint8), torch.arange(1000), names
    )
    write_fitted(teacher, images, config, ITERATIONS, directory / "dit-xl")


def _assembly(directory: Path) -> None:
    family = load_family(directory / "dit-xl")
    family.assemble(family.scales_of(HALF), Mode.FACTORED, DType.BFLOAT16)


def _export(directory: Path) -> None:
    family = load_family(directory / "dit-xl")
    export_model(family, family.scales_of(HALF), directory / "export")


def _native_export(directory: Path) -> None:
    family = load_family(directory / "dit-xl")
    own, out = family.scales_of(HALF), directory / "native"
    names = family.manifest.class_names
    save_model(out, family, own, Mode.FACTORED, DType.BFLOAT16, names, whole=True)


STAGES: dict[str, Callable[[Path], None]] = {
    "teacher": _teacher,
    "fit": _fit,
    "assembly": _assembly,
    "export": _export,
    "native": _native_export,
}


def main(stage: str, directory: str) -> None:
    started = time.perf_counter()
    STAGES[stage](Path(directory))
    figures = {
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": process_peak_bytes(default_device()),
    }
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
