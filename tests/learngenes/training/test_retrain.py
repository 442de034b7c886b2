import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from learngenes.config import DType, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import Scales
from learngenes.training import tuning
from learngenes.training.prepare import HEALED
from learngenes.training.retrain import RetrainingConfig, retrain
from learngenes.training.tuning import Progress, split_heldout

SIZE = Size(depth=3, rank=24)


@pytest.fixture
def start(family: Family) -> Scales:
    return family.scales_of(SIZE)


def test_only_the_models_own_parameters_learn(family: Family, start: Scales) -> None:
    shared = copy.deepcopy(family.genes.state_dict() | family.stem.state_dict())
    before = start.stacked()
    result = retrain(family, start, RetrainingConfig(steps=20, heldout_every_steps=5))
    assert result.steps == 20
    assert result.heldout_loss < result.initial_heldout_loss
    assert not torch.equal(result.scales.stacked()["sigma.qkv"], before["sigma.qkv"])
    now = family.genes.state_dict() | family.stem.state_dict()
    assert all(torch.equal(v, shared[k]) for k, v in now.items())


def test_it_stops_when_the_heldout_loss_stops_falling(family: Family, start: Scales) -> None:
    config = RetrainingConfig(
        steps=100, learning_rate=3.0, heldout_every_steps=1, patience=2, heldout_images=50
    )
    result = retrain(family, start, config)
    assert result.steps < 100
    assert result.heldout_loss <= result.initial_heldout_loss


def test_it_stops_when_the_time_is_up(family: Family, start: Scales) -> None:
    config = RetrainingConfig(steps=10**6, max_seconds=0.5, patience=10**6)
    result = retrain(family, start, config)
    assert result.steps < 10**6
    assert result.stopped == "time"


@pytest.mark.parametrize(
    ("step_seconds", "steps"), [(0.1, 100), (1.0, 30), (10.0, 10)], ids=["idle", "busy", "hopeless"]
)
def test_time_does_not_end_it_before_its_least_steps_unless_that_takes_for_ever(
    family: Family,
    start: Scales,
    monkeypatch: pytest.MonkeyPatch,
    step_seconds: float,
    steps: int,
) -> None:
    clock = [0.0]
    monkeypatch.setattr(tuning, "time", SimpleNamespace(monotonic=lambda: clock[0]))

    def tick(_: Progress) -> None:
        clock[0] += step_seconds

    config = RetrainingConfig(steps=10**6, least_steps=30, max_seconds=10, patience=10**6)
    result = retrain(family, start, config, tick)
    assert (result.steps, result.stopped) == (pytest.approx(steps, abs=3), "time")


def test_it_says_what_ended_it(family: Family, start: Scales) -> None:
    steps = RetrainingConfig(steps=2)
    assert retrain(family, start, steps).stopped == "steps"
    still = RetrainingConfig(
        steps=1000, heldout_every_steps=1, patience=1, learning_rate=1e3, max_seconds=1e3
    )
    assert retrain(family, start, still).stopped == "converged"


def test_every_step_is_told_and_can_cancel(family: Family, start: Scales) -> None:
    told: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        told.append(progress)
        if progress.step == 3:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        retrain(family, start, RetrainingConfig(steps=9, heldout_every_steps=2), on_progress)
    assert [p.step for p in told] == [1, 2, 3]
    assert [p.heldout_loss is not None for p in told] == [False, True, False]


def test_another_task_can_be_learned(
    family: Family, start: Scales, limited_data: LabelledImages
) -> None:
    inverted = LabelledImages(
        255 - limited_data.images, limited_data.labels, limited_data.class_names
    )
    result = retrain(family, start, RetrainingConfig(steps=10), data=inverted)
    assert result.heldout_loss < result.initial_heldout_loss


def test_no_class_is_judged_by_its_last_image(limited_data: LabelledImages) -> None:
    few = limited_data.subset(torch.arange(10))  # two of each class
    train, held = split_heldout(few, 100)
    assert (len(train), len(held)) == (8, 2)
    assert set(train.labels.tolist()) == set(few.labels.tolist())
    train, held = split_heldout(limited_data.subset(torch.tensor([0, 1, 5, 6])), 100)
    assert (len(train), len(held)) == (3, 1)
    _, held = split_heldout(limited_data, 7)
    assert len(held) == 7


def test_a_checkpoint_of_an_earlier_release_is_begun_anew(
    family: Family, start: Scales, tmp_path: Path
) -> None:
    file = tmp_path / "checkpoint.safetensors"
    earlier = {"model.sigma.qkv.0": torch.ones(24), "average.sigma.qkv.0": torch.ones(24)}
    save_file(earlier, file, metadata={"step": "3"})
    result = retrain(family, start, RetrainingConfig(steps=5), checkpoint_file=file)
    assert result.steps == 5


@pytest.mark.parametrize(("mode", "dtype"), HEALED)
def test_it_learns_with_the_matrices_as_they_are_served(
    family: Family, start: Scales, mode: Mode, dtype: DType
) -> None:
    config = RetrainingConfig(steps=20, heldout_every_steps=5)
    result = retrain(family, start, config, mode=mode, dtype=dtype)
    assert result.heldout_loss < result.initial_heldout_loss
    _, held = split_heldout(family.limited_data, config.heldout_images)
    served = family.assemble(result.scales, mode, dtype)
    process = noise_process(family.manifest.diffusion)
    loss = heldout_loss(served, process, held.normalised(), held.labels)
    assert loss == pytest.approx(result.heldout_loss, rel=3e-3)
