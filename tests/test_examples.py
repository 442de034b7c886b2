"""The examples run, in processes that cannot import anything of ours."""

import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from learngenes.config import Mode, NetworkConfig
from learngenes.data import LabelledImages
from learngenes.diffusion import heldout_loss, noise_process
from learngenes.export import export_model
from learngenes.family import Family
from learngenes.teacher import Teacher, read_teacher

TRAIN = Path(__file__).parent.parent / "examples" / "train_diffusers.py"
ALONE = """
import runpy, sys
sys.modules.update(dict.fromkeys(["learngenes", "worker", "registry", "service", "fineserve"]))
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture
def dataset(limited_data: LabelledImages, tmp_path: Path) -> Path:
    features = datasets.Features(
        image=datasets.Image(), label=datasets.ClassLabel(names=list(limited_data.class_names))
    )
    columns = {
        "image": list(limited_data.images.permute(0, 2, 3, 1).numpy()),
        "label": limited_data.labels.tolist(),
    }
    datasets.Dataset.from_dict(columns, features=features).save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


def trained(dataset: Path, out: Path, *options: str) -> Teacher:
    command = [sys.executable, "-I", "-c", ALONE, str(TRAIN), str(dataset), str(out), *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)
    return read_teacher(str(out))


def test_an_export_is_trained_on_with_diffusers_alone(
    family: Family, limited_data: LabelledImages, dataset: Path, tmp_path: Path
) -> None:
    export_model(family, family.scales, tmp_path / "export")
    options = ("--steps", "60", "--batch-size", "16", "--learning-rate", "3e-3")
    more = (*options, "--ema-decay", "0.5", "--model", str(tmp_path / "export"))
    after = trained(dataset, tmp_path / "out", *more)
    assert after.diffusion == family.manifest.diffusion
    before = family.assemble(family.scales, Mode.MATERIALISED)

    def loss(network: torch.nn.Module) -> float:
        images = limited_data.normalised(torch.arange(len(limited_data)))
        process = noise_process(family.manifest.diffusion)
        return heldout_loss(network, process, images, limited_data.labels)

    assert loss(after.with_classes(5).network) < 0.8 * loss(before)


def test_a_teacher_is_trained_from_scratch(
    network: NetworkConfig, dataset: Path, tmp_path: Path
) -> None:
    shape = ("--depth", "4", "--width", "32", "--heads", "4", "--patch-size", "2")
    teacher = trained(dataset, tmp_path / "out", "--steps", "2", *shape)
    assert teacher.network.config == network.model_copy(update={"rank": 32})
    assert len(teacher.network.layers) == 4
