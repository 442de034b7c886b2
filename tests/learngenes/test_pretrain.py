import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from pydantic import ValidationError

from learngenes.config import Size
from learngenes.data import DataError, LabelledImages
from learngenes.family import load_family
from learngenes.pretrain import Pretraining, PretrainingConfig, draw_size, learning_rate_at
from learngenes.publish import pretrain_family

CONFIG = """
name = "stripes"
[data]
path = "{path}"
limited_images = 40
heldout_images = 20
licence = "made by a test"
[network]
sample_size = 8
in_channels = 3
patch_size = 2
width = 16
num_attention_heads = 2
num_classes = 5
depth = 3
rank = 16
[sizes]
depths = [2, 3]
ranks = [8, 16]
[training]
steps = {steps}
batch_size = 16
learning_rate = 5e-3
warmup_steps = 4
ema_decay = 0.5
log_every_steps = 2
checkpoint_every_steps = 5
{extra}
"""


@pytest.fixture
def config_file(tmp_path: Path, limited_data: LabelledImages) -> Path:
    for split in ("train", "test"):
        for index, (image, label) in enumerate(
            zip(limited_data.images, limited_data.labels, strict=True)
        ):
            folder = tmp_path / "images" / split / limited_data.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return write_config(tmp_path / "config.toml", tmp_path / "images", steps=10)


def write_config(file: Path, path: Path, steps: int, extra: str = "") -> Path:
    file.write_text(CONFIG.format(path=path, steps=steps, extra=extra))
    return file


def test_a_family_is_trained_and_written(config_file: Path, tmp_path: Path) -> None:
    family = pretrain_family(config_file, tmp_path / "work", tmp_path / "family")
    assert load_family(tmp_path / "family").manifest == family.manifest
    assert family.manifest.trained_steps == 10
    assert len(family.limited_data) == 40
    log = [
        json.loads(line) for line in (tmp_path / "family" / "log.jsonl").read_text().splitlines()
    ]
    losses = [entry["train_loss"] for entry in log if "train_loss" in entry]
    assert losses[-1] < losses[0]
    assert [e["step"] for e in log if "heldout_loss" in e] == [5, 10]
    with Image.open(tmp_path / "family" / "samples.png") as grid:
        assert grid.size == (8 * 10 * 2, 8 * 4 * 2)


def test_a_killed_run_resumes_as_if_it_had_not_been(config_file: Path, tmp_path: Path) -> None:
    config = PretrainingConfig.read(config_file)
    whole = Pretraining(config, tmp_path / "whole").run()
    killed = Pretraining(config, tmp_path / "killed")
    for _ in range(5):
        killed._train_step()
        killed.step += 1
    killed._write_log({"train_loss": 1.0})
    killed._checkpoint()
    killed.step = 6
    killed._write_log({"train_loss": 2.0})
    resumed = Pretraining(config, tmp_path / "killed")
    assert resumed.step == 5
    assert (tmp_path / "killed" / "log.jsonl").read_text().count("\n") == 1
    for name, tensor in resumed.run().state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])


def test_any_size_draws_every_size_and_the_full_one_most(config_file: Path) -> None:
    config = PretrainingConfig.read(config_file)
    generator = torch.Generator().manual_seed(0)
    drawn = [draw_size(config, generator) for _ in range(400)]
    assert {(s.depth, s.rank) for s in drawn} == {(2, 8), (2, 16), (3, 8), (3, 16)}
    counts = {size: drawn.count(size) for size in drawn}
    assert max(counts, key=lambda size: counts[size]) == Size(depth=3, rank=16)


def test_fixed_depth_is_the_papers_form(config_file: Path) -> None:
    path = config_file.parent / "images"
    fixed = write_config(config_file, path, 10, 'form = "fixed-depth"')
    config = PretrainingConfig.read(fixed)
    drawn = {draw_size(config, torch.Generator().manual_seed(i)) for i in range(20)}
    assert drawn == {Size(depth=3, rank=16)}


def test_the_learning_rate_warms_up_and_falls_to_zero(config_file: Path) -> None:
    training = PretrainingConfig.read(config_file).training
    rates = [learning_rate_at(training, step) for step in range(11)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_another_number_of_classes_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "sixth").mkdir()
    with pytest.raises(DataError, match="6 classes, the network is for 5"):
        Pretraining(PretrainingConfig.read(config_file), tmp_path / "work")


def test_an_unknown_option_is_refused(config_file: Path) -> None:
    write_config(config_file, config_file.parent, 10, "lerning_rate = 1")
    with pytest.raises(ValidationError, match="lerning_rate"):
        PretrainingConfig.read(config_file)


@pytest.mark.slow
def test_two_processes_train_one_family(config_file: Path, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "accelerate.commands.launch"),
        *("--cpu", "--num_processes", "2", "--mixed_precision", "no", "--num_machines", "1"),
        *("-m", "fineserve", "pretrain", str(config_file)),
        *("--work", str(tmp_path / "work"), "--family", str(tmp_path / "family")),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert load_family(tmp_path / "family").manifest.trained_steps == 10
    log = (tmp_path / "family" / "log.jsonl").read_text().splitlines()
    assert len(log) == 7
