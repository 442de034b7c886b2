import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from learngenes.config import ConfigError, Size
from learngenes.data.images import DataError
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import FamilyError, load_family
from learngenes.training.config import PretrainingConfig
from learngenes.training.new_family import pretrain_family
from learngenes.training.pretrain import Pretraining, learning_rate_share
from tests.support.commands import run
from tests.support.trainings import Settings, image_folder, under, write_config

CONFIG = {
    "name": "stripes",
    **under("network", sample_size=8, in_channels=3, patch_size=2, num_classes=5),
    **under("network", width=16, num_attention_heads=2, depth=3, rank=16),
    **under("sizes", depths=[2, 3], ranks=[8, 16]),
    **under("training", steps=10, batch_size=16, learning_rate=5e-3, warmup_steps=4),
    **under(
        "training",
        compiled=False,
        preparation_steps=4,
        depths_from=0.5,
        ema_decay=0.5,
        log_every_steps=2,
        checkpoint_every_steps=5,
    ),
}
Configure = Callable[..., PretrainingConfig]
"""Writer of the configuration file, with other settings than CONFIG's."""


@pytest.fixture
def config_file(tmp_path: Path, limited_data: LabelledImages) -> Path:
    images = image_folder(limited_data, tmp_path / "images")
    return write_config(tmp_path / "config.toml", images, CONFIG)


@pytest.fixture
def configure(config_file: Path) -> Configure:
    def configured(*settings: Settings) -> PretrainingConfig:
        write_config(config_file, config_file.parent / "images", CONFIG, *settings)
        return PretrainingConfig.read(config_file)

    return configured


def entries(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "log.jsonl").read_text().splitlines()]


def test_a_family_is_trained_and_written(config_file: Path, tmp_path: Path) -> None:
    family = pretrain_family(config_file, tmp_path / "work", tmp_path / "family")
    assert load_family(tmp_path / "family").manifest == family.manifest
    assert family.manifest.trained_steps == 10
    assert len(family.limited_data) == 40
    log = entries(tmp_path / "family")
    losses = [entry["train_loss"] for entry in log if "train_loss" in entry]
    assert losses[-1] < losses[0]
    assert [e["step"] for e in log if "heldout_loss" in e] == [5, 10]
    with Image.open(tmp_path / "family" / "samples.png") as grid:
        assert grid.size == (8 * 10 * 2, 8 * 2 * 2)


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), atol=0, rtol=0)


class Killed(BaseException):
    """As if by a signal."""


def run_killed_after(steps: int, pretraining: Pretraining) -> None:
    """Train until so many steps are done and the next one has begun."""
    drawn = max(0, steps - pretraining.config.training.depths_from_step)
    forwards = iter(range(steps + drawn))

    def kill(*_: object) -> None:
        if next(forwards, None) is None:
            raise Killed

    pretraining.model.register_forward_pre_hook(kill)
    with pytest.raises(Killed):
        pretraining.run()


def test_a_killed_run_resumes_as_if_it_had_not_been(configure: Configure, tmp_path: Path) -> None:
    config, directory = configure(), tmp_path / "killed"
    whole = Pretraining(config, tmp_path / "whole").run()
    run_killed_after(6, Pretraining(config, directory))
    assert [entry["step"] for entry in entries(directory)] == [2, 4, 5, 6]
    resumed = Pretraining(config, directory)
    assert resumed.step == 5
    assert [entry["step"] for entry in entries(directory)] == [2, 4, 5]
    torch.testing.assert_close(resumed.run().state_dict(), whole.state_dict())


def test_a_training_that_begins_anew_forgets_what_was_prepared(
    configure: Configure, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    stale = work / "prepared-2.safetensors"
    stale.write_bytes(b"of other U and V")
    run_killed_after(6, Pretraining(configure(), work))
    assert not stale.exists()
    stale.write_bytes(b"of these")
    Pretraining(configure(), work)
    assert stale.exists()


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
        assert grid.size == (8 * 6 * 2, 8 * 2 * 2)


def test_a_training_does_not_go_on_with_another_configuration(
    config_file: Path, tmp_path: Path
) -> None:
    words = ["pretrain", str(config_file), "--work", str(tmp_path / "work")]
    words += ["--family", str(tmp_path / "family")]

    def told(exit_code: int, settings: Settings) -> str:
        write_config(config_file, tmp_path / "images", CONFIG, settings)
        return run(*words, exit_code=exit_code).stderr

    told(0, {})
    another = told(1, {"training.learning_rate": 1e-3})
    assert "another configuration (of training.learning_rate)" in another
    told(0, {"training.log_every_steps": 3})
    low = told(1, {"network.rank": 12})
    assert "sizes.ranks go up to 16, the network's rank is 12" in low


def test_a_training_goes_on_with_a_family_at_another_depth(
    config_file: Path, configure: Configure, tmp_path: Path
) -> None:
    first = pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    deeper = configure({"network.depth": 5, "sizes.depths": [2, 5]})
    begun = Pretraining(deeper, tmp_path / "work", tmp_path / "family")
    assert_equal(begun.model.genes, first.genes)
    ends = begun.model.scales.stacked()["sigma.qkv"][[0, 2, 4]]
    torch.testing.assert_close(ends, first.scales.stacked()["sigma.qkv"])

    second = pretrain_family(
        config_file, tmp_path / "work", tmp_path / "deeper", start=tmp_path / "family"
    )
    assert second.manifest.trained_steps == 20
    log = entries(tmp_path / "deeper")
    assert [e["step"] for e in log if "train_loss" in e] == [*range(2, 22, 2)]
    assert log[-1]["images"] == 20 * 16


def test_a_killed_training_that_went_on_with_a_family_resumes(
    config_file: Path, configure: Configure, tmp_path: Path
) -> None:
    pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    config = configure({"training.depths_from": 0.8})  # the kill is before
    killed = Pretraining(config, tmp_path / "work", tmp_path / "family")
    run_killed_after(5, killed)
    resumed = Pretraining(config, tmp_path / "work")  # where it began is in the checkpoint
    assert (resumed.step, resumed.before.steps, resumed.before.images) == (5, 10, 160)
    assert_equal(resumed.model, killed.model)


def test_only_a_family_of_the_same_width_can_be_gone_on_with(
    config_file: Path, configure: Configure, tmp_path: Path
) -> None:
    pretrain_family(config_file, tmp_path / "first", tmp_path / "family")
    with pytest.raises(FamilyError, match="only the depth may differ"):
        Pretraining(configure({"network.width": 32}), tmp_path / "work", tmp_path / "family")


def depths_of_steps(config: PretrainingConfig, work: Path) -> list[int]:
    """Depths that the network is asked for while it is trained."""
    pretraining = Pretraining(config, work)
    asked: list[int] = []
    pretraining.model.register_forward_pre_hook(lambda _, inputs: asked.append(inputs[3]))
    pretraining.run()
    return asked


def test_in_the_last_steps_a_drawn_depth_is_trained_beside_the_full_one(
    configure: Configure, tmp_path: Path
) -> None:
    depths = {"network.depth": 4, "sizes.depths": [2, 3, 4]}
    asked = depths_of_steps(configure({"training.steps": 40}, depths), tmp_path / "late")
    assert asked[:20] == [4] * 20
    assert asked[20::2] == [4] * 20
    assert set(asked[21::2]) == {2, 3}
    config = configure(under("training", depths_from=1, steps=4))
    assert depths_of_steps(config, tmp_path / "none") == [3] * 4
    alone = configure({"sizes.depths": [3], "training.steps": 4})
    assert depths_of_steps(alone, tmp_path / "alone") == [3] * 4


def test_each_depth_is_kept_with_a_sigma_of_its_own(config_file: Path, tmp_path: Path) -> None:
    family = pretrain_family(config_file, tmp_path / "work", tmp_path / "family")
    assert set(family.depths) == {2, 3}
    assert sorted(family.manifest.layer_order) == [0, 1, 2]
    small = family.scales_of(Size(depth=2, rank=16)).stacked()
    torch.testing.assert_close(small, family.depths[2].stacked())
    kept = [i for i in range(3) if i != family.manifest.layer_order[0]]
    assert not torch.equal(small["sigma.o"], family.scales.stacked()["sigma.o"][kept])


def test_a_drawn_depth_learns_from_the_full_one(configure: Configure, tmp_path: Path) -> None:
    wanted = []
    for share in (0.0, 1.0):
        config = configure(under("training", steps=1, depths_from=0, distillation=share, seed=3))
        pretraining = Pretraining(config, tmp_path / f"work{share}")
        with patch("learngenes.training.pretrain.F.mse_loss", wraps=F.mse_loss) as loss:
            pretraining.run()
        trained = [call.args for call in loss.call_args_list if not call.kwargs]
        (full, target), (_, learned) = trained
        expected = target if share == 0 else full
        torch.testing.assert_close(learned, expected)
        wanted.append(learned)
    assert not torch.equal(*wanted)


def test_the_learning_rate_warms_up_and_falls_to_zero(configure: Configure) -> None:
    training = configure().training
    rates = [learning_rate_share(training, step) for step in range(11)]
    assert rates[0] < rates[1] < rates[2]
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[10] == pytest.approx(0)


def test_another_number_of_classes_is_refused(configure: Configure, tmp_path: Path) -> None:
    train = tmp_path / "images" / "train"
    shutil.copytree(next(train.iterdir()), train / "sixth")
    with pytest.raises(DataError, match="6 classes, the network is for 5"):
        Pretraining(configure(), tmp_path / "work")


def test_a_training_that_diverges_ends_and_says_so(config_file: Path, tmp_path: Path) -> None:
    wild = under("training", sigma_learning_rate=1e30, clip_norm=1e30)
    config = write_config(config_file, tmp_path / "images", CONFIG, wild)
    words = ["--work", str(tmp_path / "work"), "--family", str(tmp_path / "family")]
    told = run("pretrain", str(config), *words, exit_code=1)
    assert "lower the learning rates" in told.stderr
    assert not (tmp_path / "family").exists()


def test_an_unknown_option_is_refused(configure: Configure) -> None:
    with pytest.raises(ConfigError, match=r"training\.lerning_rate"):
        configure({"training.lerning_rate": 1})


def two_processes(config: Path, out: Path) -> "subprocess.Popen[bytes]":
    """A training of two processes of this CPU (gloo), into `out`."""
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "fineserve", "pretrain", str(config)),
        *("--work", str(out / "work"), "--family", str(out / "family")),
    ]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, stderr=subprocess.PIPE, env=environment)


def finished(training: "subprocess.Popen[bytes]") -> int:
    with training:
        _, told = training.communicate(timeout=240)
    assert told is not None
    return training.returncode


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_batch_of_both(
    config_file: Path, tmp_path: Path
) -> None:
    assert finished(two_processes(config_file, tmp_path)) == 0
    both = {"training.batch_size": 2 * PretrainingConfig.read(config_file).training.batch_size}
    alone = write_config(tmp_path / "both.toml", tmp_path / "images", CONFIG, both)
    words = ["--work", str(tmp_path / "alone"), "--family", str(tmp_path / "family-alone")]
    run("pretrain", str(alone), *words)
    ours, theirs = (entries(tmp_path / name) for name in ("family", "family-alone"))
    assert len(ours) == 7
    for two, one in zip(ours, theirs, strict=True):
        assert (two["step"], two["images"]) == (one["step"], one["images"])
        for losses in one.keys() - {"step", "images"}:
            assert two[losses] == pytest.approx(one[losses], rel=2e-3), losses


@pytest.mark.slow
def test_processes_go_on_together_when_one_was_killed(
    configure: Configure, config_file: Path, tmp_path: Path
) -> None:
    configure({"training.steps": 200, "training.checkpoint_every_steps": 20})
    first = two_processes(config_file, tmp_path)
    while not (tmp_path / "work" / "checkpoint.safetensors").exists():
        assert first.poll() is None
        time.sleep(0.05)
    children = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    os.kill(int(children[-1]), signal.SIGKILL)
    assert finished(first) != 0, "it ends, and does not wait for the dead"
    assert not (tmp_path / "family").exists()
    assert finished(two_processes(config_file, tmp_path)) == 0
    assert load_family(tmp_path / "family").manifest.trained_steps == 200
    assert finished(two_processes(config_file, tmp_path / "whole")) == 0
    ours, theirs = (entries(tmp_path / name) for name in ("family", "whole/family"))
    assert ours == theirs, "as if it had not been killed"
    held = [each["heldout_loss"]["L3"] for each in ours if "heldout_loss" in each]
    assert held[-1] < 0.3, "it has learned"


def test_a_run_goes_on_with_its_classes_in_their_order(
    configure: Configure, tmp_path: Path
) -> None:
    work = tmp_path / "work"
    first = Pretraining(configure(), work)
    names = json.loads((work / "classes.json").read_text())
    assert tuple(names) == first.images.class_names
    (work / "classes.json").write_text(json.dumps(names[::-1]))
    with pytest.raises(DataError, match="this run has begun with the classes"):
        Pretraining(configure(), work)


def test_a_run_of_a_release_that_ordered_numbers_as_text_does_not_mix_them(
    configure: Configure, tmp_path: Path
) -> None:
    run = Pretraining(configure(), tmp_path / "work")
    (tmp_path / "work" / "classes.json").unlink()
    run.step = 1
    numbers = [str(number) for number in range(11)]
    run._require_same_classes(numbers[:10])
    (tmp_path / "work" / "classes.json").unlink()
    with pytest.raises(DataError, match="0, 1, 10, 2"):
        run._require_same_classes(numbers)
