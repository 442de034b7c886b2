import copy
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from learngenes.config import DType, Kind, Mode, Size
from learngenes.family.family import Family
from learngenes.model.diffusion import heldout_loss, noise_process
from learngenes.model.factors import DenseLayers, Scales
from learngenes.training.refine import RefinementConfig, refine
from learngenes.training.retrain import Retrained, RetrainingConfig, retrain
from learngenes.training.tuning import Enough, OnProgress, Pause, Progress, split_heldout
from tests.learngenes.model.test_dit import inputs

SIZE = Size(depth=3, rank=24)
CONFIG = RefinementConfig(
    steps=20, max_seconds=float("inf"), learning_rate=1e-3, heldout_every_steps=5
)


@pytest.fixture
def start(family: Family) -> Scales:
    return family.scales_of(SIZE).requires_grad_(False)


@pytest.fixture
def retrained(family: Family, start: Scales) -> Retrained:
    return retrain(family, start, RetrainingConfig(steps=60, patience=99))


def same(one: DenseLayers, other: DenseLayers) -> bool:
    return all(torch.equal(t, other.stacked()[name]) for name, t in one.stacked().items())


def ending(error: type[Exception], step: int) -> OnProgress:
    def on_progress(progress: Progress) -> None:
        if progress.step == step:
            raise error

    return on_progress


def written_out(family: Family, scales: Scales) -> DenseLayers:
    return refine(family, scales, CONFIG.model_copy(update={"learning_rate": 0.0})).layers


def test_every_weight_learns_what_sigma_alone_cannot(family: Family, retrained: Retrained) -> None:
    shared = copy.deepcopy(family.genes.state_dict() | family.stem.state_dict())
    refined = refine(family, retrained.scales, CONFIG.model_copy(update={"steps": 60}))
    assert refined.steps == 60
    assert refined.initial_heldout_loss == pytest.approx(retrained.heldout_loss, rel=1e-3)
    assert refined.heldout_loss < 0.98 * retrained.heldout_loss
    before = written_out(family, retrained.scales)
    assert not any(torch.equal(refined.layers.weight[k], before.weight[k]) for k in Kind)
    now = family.genes.state_dict() | family.stem.state_dict()
    assert all(torch.equal(v, shared[k]) for k, v in now.items())


def test_a_refined_model_is_assembled_from_its_layers(family: Family, start: Scales) -> None:
    unchanged = family.assemble(written_out(family, start), Mode.MATERIALISED)
    given = inputs(family.manifest.network)
    factored = family.assemble(start, Mode.FACTORED)
    torch.testing.assert_close(unchanged(*given), factored(*given))
    with pytest.raises(ValueError, match="its mode is materialised"):
        family.assemble(written_out(family, start), Mode.FACTORED)


def test_what_was_stopped_goes_on_as_if_it_had_not_been(
    family: Family, start: Scales, tmp_path: Path
) -> None:
    file = tmp_path / "refinement.safetensors"
    whole = refine(family, start, CONFIG)
    with pytest.raises(Pause):
        refine(family, start, CONFIG, ending(Pause, 12), file)
    steps: list[int] = []
    resumed = refine(family, start, CONFIG, lambda p: steps.append(p.step), file)
    assert steps == list(range(13, 21))
    assert same(resumed.layers, whole.layers)
    assert resumed.initial_heldout_loss == whole.initial_heldout_loss


def test_patience_outlasts_a_pause(family: Family, retrained: Retrained, tmp_path: Path) -> None:
    """Held-out losses that were no better count, before and after."""
    file = tmp_path / "refinement.safetensors"
    wild = CONFIG.model_copy(update={"learning_rate": 1000.0, "patience": 3})
    assert refine(family, retrained.scales, wild).steps == 15
    with pytest.raises(Pause):
        refine(family, retrained.scales, wild, ending(Pause, 11), file)
    assert refine(family, retrained.scales, wild, None, file).steps == 15


def test_an_unreadable_checkpoint_is_begun_anew(
    family: Family, start: Scales, tmp_path: Path
) -> None:
    file = tmp_path / "refinement.safetensors"
    file.write_bytes(b"half a file")
    steps: list[int] = []
    refine(family, start, CONFIG, lambda p: steps.append(p.step), file)
    assert steps == [*range(1, 21)]


def test_enough_keeps_the_best_so_far(family: Family, start: Scales) -> None:
    refined = refine(family, start, CONFIG, ending(Enough, 7))
    assert refined.steps == 7
    assert refined.heldout_loss < refined.initial_heldout_loss


def test_it_never_makes_a_model_worse(family: Family, retrained: Retrained) -> None:
    wild = CONFIG.model_copy(update={"learning_rate": 1000.0, "steps": 6})
    refined = refine(family, retrained.scales, wild)
    assert refined.heldout_loss == refined.initial_heldout_loss
    assert same(refined.layers, written_out(family, retrained.scales))


def test_only_a_smaller_model_learns_from_the_full_size(
    family: Family, start: Scales, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Mock(wraps=family.assemble)
    monkeypatch.setattr(Family, "assemble", asked)
    refine(family, family.scales_of(family.full_size), CONFIG)
    assert asked.call_count == 0
    refine(family, start, CONFIG)
    assert [call.args[0] for call in asked.call_args_list] == [family.scales]


def test_it_learns_with_rounded_weights_and_keeps_those_before(
    family: Family, retrained: Retrained
) -> None:
    config = CONFIG.model_copy(update={"steps": 40})
    refined = refine(family, retrained.scales, config, dtype=DType.INT4)
    assert refined.heldout_loss < refined.initial_heldout_loss
    _, held = split_heldout(family.limited_data, config.heldout_images)
    served = family.assemble(refined.layers, Mode.MATERIALISED, DType.INT4)
    process = noise_process(family.manifest.diffusion)
    loss = heldout_loss(served, process, held.normalised(), held.labels)
    assert loss == pytest.approx(refined.heldout_loss, rel=3e-3)
