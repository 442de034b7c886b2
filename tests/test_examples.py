"""Examples, run in processes that cannot import anything of ours."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch
from diffusers import DiTPipeline
from PIL import Image

from learngenes.config import Mode, NetworkConfig
from learngenes.data.labelled import LabelledImages
from learngenes.data.latents import read_autoencoder
from learngenes.family.family import Family
from learngenes.formats.diffusers import export_model
from learngenes.formats.teacher import Teacher, read_teacher
from learngenes.model.diffusion import heldout_loss, noise_process
from tests.learngenes.data.test_latents import directory, latent_family

__all__ = ["directory", "latent_family"]

EXAMPLES = Path(__file__).parent.parent / "examples"
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


def run(example: str, *words: object) -> None:
    command = [sys.executable, "-I", "-c", ALONE, EXAMPLES / example, *map(str, words)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_DATASETS_OFFLINE": "1"}
    subprocess.run(command, check=True, env=environment, capture_output=True)


def trained(dataset: Path, out: Path, *options: object) -> Teacher:
    run("train_diffusers.py", dataset, out, *options)
    return read_teacher(str(out))


def test_an_export_is_trained_on_with_diffusers_alone(
    family: Family, limited_data: LabelledImages, dataset: Path, tmp_path: Path
) -> None:
    export_model(family, family.scales, tmp_path / "export")
    options = ("--steps", 60, "--batch-size", 16, "--learning-rate", 3e-3, "--ema-decay", 0.5)
    after = trained(dataset, tmp_path / "out", *options, "--model", tmp_path / "export")
    assert after.diffusion == family.manifest.diffusion
    before = family.assemble(family.scales, Mode.MATERIALISED)

    def loss(network: torch.nn.Module) -> float:
        images = limited_data.normalised(torch.arange(len(limited_data)))
        process = noise_process(family.manifest.diffusion)
        return heldout_loss(network, process, images, limited_data.labels)

    assert loss(after.with_classes(limited_data.class_names).network) < 0.8 * loss(before)


def test_an_export_of_latents_is_trained_on_and_sampled_by_diffusers(
    latent_family: Family, dataset: Path, tmp_path: Path
) -> None:
    export_model(latent_family, latent_family.scales, tmp_path / "export")
    options = ("--steps", 3, "--batch-size", 16, "--model", tmp_path / "export")
    run("train_diffusers.py", dataset, tmp_path / "out", *options)
    pipeline = DiTPipeline.from_pretrained(tmp_path / "out")
    pipeline.set_progress_bar_config(disable=True)
    labels = pipeline.get_label_ids(list(latent_family.manifest.class_names[:2]))
    images = pipeline(labels, num_inference_steps=2, output_type="np").images
    assert images.shape == (2, 8, 8, 3)


def test_classes_keep_the_numbers_that_the_model_has_for_them(
    family: Family, limited_data: LabelledImages, tmp_path: Path
) -> None:
    export_model(family, family.scales, tmp_path / "export")
    names = family.manifest.class_names
    assert [*names] != sorted(names)  # as folders are
    for number, name in enumerate(names):
        (tmp_path / "images" / name).mkdir(parents=True)
        (mine,) = (limited_data.labels == number).nonzero()[:1]
        picture = Image.fromarray(limited_data.images[mine][0].permute(1, 2, 0).numpy())
        for i, side in enumerate((8, 11)):  # scaled to what the model sees
            picture.resize((side, side)).save(tmp_path / "images" / name / f"{i}.png")
    options = ("--steps", 1, "--batch-size", 4, "--model", tmp_path / "export")
    run("train_diffusers.py", tmp_path / "images", tmp_path / "out", *options)
    wanted = {str(number): name for number, name in enumerate(names)}
    for where in ("export", "out"):
        assert json.loads((tmp_path / where / "id2label.json").read_text()) == wanted


def test_a_new_teacher_is_trained(network: NetworkConfig, dataset: Path, tmp_path: Path) -> None:
    shape = ("--depth", 4, "--width", 32, "--heads", 4, "--patch-size", 2)
    teacher = trained(dataset, tmp_path / "out", "--steps", 2, *shape)
    assert teacher.network.config == network.model_copy(update={"rank": 32})
    assert len(teacher.network.layers) == 4


def test_an_autoencoder_is_trained_that_a_family_can_have(
    network: NetworkConfig, limited_data: LabelledImages, dataset: Path, tmp_path: Path
) -> None:
    options = ("--channels", 8, 16, "--groups", 4, "--steps", 300, "--learning-rate", 3e-3)
    run("train_autoencoder.py", dataset, tmp_path / "out", *options, "--flip")
    shape = network.model_copy(update={"sample_size": 4, "in_channels": 4, "patch_size": 1})
    _, encoder, decoder = read_autoencoder(tmp_path / "out", shape)
    latents = encoder.encoded(limited_data).normalised(torch.arange(len(limited_data)))
    assert latents.std() == pytest.approx(1, rel=0.1)
    difference = decoder.pixels(latents).float() - limited_data.images.float()
    far = limited_data.images.float() - limited_data.images.float().mean()
    assert difference.abs().mean() < 0.5 * far.abs().mean()
