import json
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fineserve.cli.main import cli
from learngenes.config import ConfigError, Size
from learngenes.data.images import DataError
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import FamilyError, load_family
from learngenes.training.config import PretrainingConfig
from learngenes.training.new_family import pretrain_family
from learngenes.training.pretrain import Pretraining, learning_rate_share

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
    path = image_folder(limited_data, tmp_path / "images")
    return write_config(tmp_path / "config.toml", path, steps=10)


def image_folder(data: LabelledImages, path: Path) -> Path:
    """The same images as a training and as a test split."""
    for split in ("train", "test"):
        for index, (image, label) in enumerate(zip(data.images, data.labels, strict=True)):
            folder = path / split / data.class_names[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index}.png")
    return path


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


class Killed(BaseException):
    """As if by a signal."""


def run_killed_after(steps: int, pretraining: Pretraining) -> None:
    """Train until so many steps are done and the next one has begun."""
    forwards = iter(range(2 * steps))  # one of the full size and one of a drawn size each

    def kill(*_: object) -> None:
        if next(forwards, None) is None:
            raise Killed

    pretraining.model.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        pretraining.run()


def test_a_killed_run_resumes_as_if_it_had_not_been(config_file: Path, tmp_path: Path) -> None:
    config = PretrainingConfig.read(config_file)
    whole = Pretraining(config, tmp_path / "whole").run()
    log = tmp_path / "killed" / "log.jsonl"
    run_killed_after(6, Pretraining(config, tmp_path / "killed"))
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 5, 6]
    resumed = Pretraining(config, tmp_path / "killed")
    assert resumed.step == 5
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [2, 4, 5]
    for name, tensor in resumed.run().state_dict().items():
        torch.testing.assert_close(tensor, whole.state_dict()[name])


def test_a_family_in_place_of_another_has_nothing_of_it(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "family").mkdir()
    for stale in ("quality.json", "previews.png"):
        (tmp_path / "family" / stale).write_text("{}")
    family = pretrain_family(config_file, tmp_path / "work", tmp_path / "family")
    assert family.quality is None
    assert not {"quality.json", "previews.png"} & set(family.manifest.sha256)


def test_the_grid_of_a_family_with_many_classes_is_of_some(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("learngenes.training.new_family.GRID_CLASSES", 3)
    pretrain_family(config_file, tmp_path / "work", tmp_path / "family")
    with Image.open(tmp_path / "family" / "samples.png") as grid:
        assert grid.size == (8 * 6 * 2, 8 * 4 * 2)


def test_a_training_does_not_go_on_with_another_configuration(
    config_file: Path, tmp_path: Path
) -> None:
    words = ["pretrain", str(config_file), "--work", str(tmp_path / "work")]

    def told() -> str:
        result = CliRunner().invoke(cli, [*words, "--family", str(tmp_path / "family")])
        return result.stderr if result.exit_code else ""

    assert told() == ""
    text = config_file.read_text()
    config_file.write_text(text.replace("learning_rate = 5e-3", "learning_rate = 1e-3"))
    assert "another configuration (of training.learning_rate)" in told()
    config_file.write_text(text.replace("log_every_steps = 2", "log_every_steps = 3"))
    assert told() == ""
    config_file.write_text(text.replace("rank = 16", "rank = 12"))
    assert "sizes.ranks go up to 16, the network's rank is 12" in told()


def test_a_training_goes_on_with_a_family_at_another_depth(
    config_file: Path, tmp_path: Path
) -> None:
    first = pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    deeper = config_file.read_text().replace("depth = 3", "depth = 5")
    config_file.write_text(deeper.replace("depths = [2, 3]", "depths = [2, 5]"))
    begun = Pretraining(PretrainingConfig.read(config_file), tmp_path / "work", tmp_path / "family")
    for name, tensor in begun.model.genes.state_dict().items():
        assert torch.equal(tensor, first.genes.state_dict()[name])
    ends = begun.model.scales.stacked()["sigma.qkv"][[0, 2, 4]]
    torch.testing.assert_close(ends, first.scales.stacked()["sigma.qkv"])

    second = pretrain_family(
        config_file, tmp_path / "work", tmp_path / "deeper", start=tmp_path / "family"
    )
    assert second.manifest.trained_steps == 20
    entries = [json.loads(x) for x in (tmp_path / "deeper" / "log.jsonl").read_text().splitlines()]
    steps = [entry["step"] for entry in entries if "train_loss" in entry]
    assert steps == [2, 4, 6, 8, 10, 12, 14, 16, 18, 20]
    assert entries[-1]["images"] == 20 * 16


def test_a_killed_training_that_went_on_with_a_family_resumes(
    config_file: Path, tmp_path: Path
) -> None:
    pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    config = PretrainingConfig.read(config_file)
    killed = Pretraining(config, tmp_path / "work", tmp_path / "family")
    run_killed_after(5, killed)
    resumed = Pretraining(config, tmp_path / "work")  # where it began is in the checkpoint
    assert (resumed.step, resumed.before.steps, resumed.before.images) == (5, 10, 160)
    for name, tensor in resumed.model.state_dict().items():
        assert torch.equal(tensor, killed.model.state_dict()[name])


def test_only_a_family_of_the_same_width_can_be_gone_on_with(
    config_file: Path, tmp_path: Path
) -> None:
    pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    config_file.write_text(config_file.read_text().replace("width = 16", "width = 32"))
    config = PretrainingConfig.read(config_file)
    with pytest.raises(FamilyError, match="only the depth may differ"):
        Pretraining(config, tmp_path / "work", tmp_path / "family")


def sizes_of_steps(config_file: Path, work: Path, steps: int) -> list[Size]:
    """Whatever the network is asked for while it is trained."""
    config = PretrainingConfig.read(config_file)
    training = config.training.model_copy(update={"steps": steps})
    pretraining = Pretraining(config.model_copy(update={"training": training}), work)
    asked: list[Size] = []
    pretraining.model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[3]))
    pretraining.run()
    return asked


def test_any_size_trains_the_full_size_and_a_drawn_one_in_every_step(
    config_file: Path, tmp_path: Path
) -> None:
    asked = sizes_of_steps(config_file, tmp_path / "work", 40)
    assert set(asked[::2]) == {Size(depth=3, rank=16)}
    assert {(s.depth, s.rank) for s in asked[1::2]} == {(2, 8), (2, 16), (3, 8), (3, 16)}


def test_fixed_depth_is_the_papers_form(config_file: Path, tmp_path: Path) -> None:
    write_config(config_file, config_file.parent / "images", 10, 'form = "fixed-depth"')
    assert sizes_of_steps(config_file, tmp_path / "work", 4) == [Size(depth=3, rank=16)] * 4


def test_a_drawn_size_learns_from_the_full_one(config_file: Path, tmp_path: Path) -> None:
    wanted = []
    for share in (0.0, 1.0):
        write_config(
            config_file, config_file.parent / "images", 1, f"distillation = {share}\nseed = 3"
        )
        pretraining = Pretraining(PretrainingConfig.read(config_file), tmp_path / f"work{share}")
        with patch("torch.nn.functional.mse_loss", wraps=torch.nn.functional.mse_loss) as loss:
            pretraining.run()
        (full, target), (_, learned) = (call.args for call in loss.call_args_list[:2])
        expected = target if share == 0 else full
        torch.testing.assert_close(learned, expected)
        wanted.append(learned)
    assert not torch.equal(*wanted)


def test_the_learning_rate_warms_up_and_falls_to_zero(config_file: Path) -> None:
    training = PretrainingConfig.read(config_file).training
    rates = [learning_rate_share(training, step) for step in range(11)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_another_number_of_classes_is_refused(config_file: Path, tmp_path: Path) -> None:
    (tmp_path / "images" / "train" / "sixth").mkdir()
    with pytest.raises(DataError, match="6 classes, the network is for 5"):
        Pretraining(PretrainingConfig.read(config_file), tmp_path / "work")


def test_a_training_that_diverges_ends_and_says_so(config_file: Path, tmp_path: Path) -> None:
    config = write_config(
        config_file, tmp_path / "images", 10, "sigma_learning_rate = 1e30\nclip_norm = 1e30"
    )
    words = ["pretrain", str(config), "--work", str(tmp_path / "work")]
    told = CliRunner().invoke(cli, [*words, "--family", str(tmp_path / "family")])
    assert told.exit_code == 1
    assert "lower the learning rates" in told.stderr
    assert not (tmp_path / "family").exists()


def test_an_unknown_option_is_refused(config_file: Path) -> None:
    write_config(config_file, config_file.parent, 10, "lerning_rate = 1")
    with pytest.raises(ConfigError, match=r"training\.lerning_rate"):
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
