"""A family from a DiT that was there before."""

import json
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

from fineserve.cli.main import cli
from learngenes.config import DType, Kind, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import export_model
from learngenes.formats.teacher import read_teacher
from learngenes.model.factors import DenseLayers
from learngenes.sizing.budget import Constraints, Workload
from learngenes.sizing.solver import Candidates, Impossible, solve
from learngenes.training.calibrate import calibrate
from learngenes.training.condense import _first_guess, fit, fit_all
from learngenes.training.config import CondensationConfig
from learngenes.training.retrain import RetrainingConfig
from tests.learngenes.model.test_dit import inputs
from tests.support.commands import run
from tests.support.failures import raising
from tests.support.sizing import device_profile, with_imported
from tests.support.trainings import Settings, image_folder, under, write_config

CONFIG = {
    "name": "condensed",
    "rank": 48,
    "fit_iterations": 30,
    "calibration_seconds": 0.2,
    **under("sizes", depths=[2, 3, 4], ranks=[8, 48]),
    **under(
        "training",
        steps=4,
        compiled=False,
        preparation_steps=2,
        healing_steps=1,
        batch_size=8,
        warmup_steps=2,
        ema_decay=0.1,
    ),
    **under("training", learning_rate=1e-3, sigma_learning_rate=1e-3, factor_learning_rate=1e-3),
    **under("training", log_every_steps=2, checkpoint_every_steps=2),
}


def test_a_stack_with_factors_in_common_is_found_again() -> None:
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, 6, generator=generator))[0] for n in (20, 12))
    sigma = torch.randn(5, 6, generator=generator) * torch.tensor([32, 16, 8, 4, 2, 1])
    stack = torch.einsum("mr,lr,nr->lmn", u, sigma, v)
    iterations: list[None] = []
    found = fit(stack, 6, 500, lambda: iterations.append(None))
    assert found.error < 0.05
    guessed = torch.einsum("lr,mr,nr->lmn", *_first_guess(stack, 6))
    assert found.error < float((guessed - stack).norm() / stack.norm()) / 3
    assert 1 < len(iterations) <= 500
    rebuilt = torch.einsum("mr,lr,nr->lmn", found.u, found.sigma, found.v)
    assert float((rebuilt - stack).norm() / stack.norm()) == pytest.approx(found.error, rel=0.01)
    weights = found.sigma.norm(dim=0)
    assert weights.tolist() == sorted(weights.tolist(), reverse=True)  # a prefix is the best part


def test_any_stack_is_fitted_at_a_rank_that_is_large_enough() -> None:
    stack = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    errors = {rank: fit(stack, rank, 100).error for rank in (2, 6, 12, 16)}
    assert errors[2] > errors[6] > errors[12]
    assert max(errors[12], errors[16]) < 0.05


def test_nothing_as_large_as_the_stack_is_rebuilt(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a kind of DiT-XL/2 that takes 37 GB."""
    rebuilt = raising(AssertionError())
    monkeypatch.setattr("tensorly.decomposition._cp.cp_to_tensor", rebuilt)
    stack = torch.randn(3, 6, 4, generator=torch.Generator().manual_seed(0))
    assert fit(stack, 12, 20, lambda: None).error < 0.5


@pytest.fixture
def teacher(family: Family, tmp_path: Path) -> Path:
    export_model(family, family.scales, tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_kind_that_was_fitted_is_not_fitted_again(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense = read_teacher(str(teacher)).network
    network = dense.config.model_copy(update={"rank": 32})
    whole, _, errors = fit_all(dense, network, 3, tmp_path / "fits")
    (tmp_path / "fits" / f"{[*Kind][-1]}.safetensors").unlink()
    counted = Mock(wraps=fit)
    monkeypatch.setattr("learngenes.training.condense.fit", counted)
    again, _, errors_again = fit_all(dense, network, 3, tmp_path / "fits")
    assert (counted.call_count, errors_again) == (1, errors)
    torch.testing.assert_close(again.state_dict(), whole.state_dict())


@pytest.fixture
def images(limited_data: LabelledImages, tmp_path: Path) -> Path:
    return image_folder(limited_data, tmp_path / "images")


def config_file(images: Path, settings: Settings | None = None) -> Path:
    return write_config(images.parent / "condense.toml", images, CONFIG, settings or {})


def words_for(teacher: Path, config: Path, out: str) -> list[str]:
    words = ["condense", str(teacher), str(config), "--work", str(config.parent / f"work-{out}")]
    return [*words, "--family", str(config.parent / out)]


def condensed(teacher: Path, images: Path, out: str) -> Family:
    run(*words_for(teacher, config_file(images), out))
    return load_family(images.parent / out)


def test_a_family_computes_what_its_teacher_did(teacher: Path, images: Path) -> None:
    made = condensed(teacher, images, "family")
    report = json.loads((images.parent / "family" / "condensation.json").read_text())
    assert all(error < 0.3 for error in report["fit_error"].values())  # it was of this rank
    assert report["heldout_loss"]["L4"] < 1.1 * report["teacher_heldout_loss"]
    assert made.manifest.trained_steps == 4
    assert len(made.limited_data) == 40


def imported(teacher: Path, images: Path, out: str) -> Family:
    run(*words_for(teacher, config_file(images), out), "--import-only")
    return load_family(images.parent / out)


def test_an_import_is_the_teacher_itself(teacher: Path, images: Path) -> None:
    made = imported(teacher, images, "family")
    dense = read_teacher(str(teacher)).with_classes(made.manifest.class_names).network
    own = made.own_of(made.full_size, Mode.DENSE, DType.FLOAT32)
    given = inputs(made.manifest.network)
    served = made.assemble(own, Mode.DENSE)(*given)
    torch.testing.assert_close(served, dense(*given), rtol=0, atol=1e-5)
    assert made.is_prepared(made.full_size, Mode.DENSE)
    assert not made.is_prepared(made.full_size, Mode.DENSE, DType.INT4)
    assert not made.is_prepared(made.full_size)

    order = made.manifest.imported_order
    assert sorted(order) == [0, 1, 2, 3]
    smaller = made.own_of(Size(depth=2, rank=32), Mode.DENSE, DType.FLOAT32)
    assert isinstance(smaller, DenseLayers)
    kept = [dense.weights()[layer] for layer in sorted(order[2:])]
    for layer, theirs in zip(smaller.layers(), kept, strict=True):
        assert all(torch.equal(layer[kind][0], theirs[kind][0]) for kind in Kind)
    with pytest.raises(ValueError, match="depth 5 is more than the 4 layers"):
        made.own_of(Size(depth=5, rank=32), Mode.DENSE, DType.FLOAT32)


def test_what_shares_nothing_is_planned_by_itself(teacher: Path, images: Path) -> None:
    made = imported(teacher, images, "family")
    table = made.quality
    assert table is not None
    assert (table.depths, table.dtype_loss_ratios) == ((), {})
    assert sorted(table.imported) == [2, 3, 4]
    network, sizes = made.manifest.network, made.manifest.sizes
    profile = with_imported(device_profile(network, sizes))
    candidates = Candidates.of(network, sizes, table, profile, Workload())
    front = solve(candidates, Constraints()).front
    assert {plan.mode for plan in front} == {Mode.DENSE}
    assert {plan.rank for plan in front} == {32}
    assert max(plan.quality for plan in front) == 1
    with pytest.raises(Impossible, match="fix less"):
        solve(candidates, Constraints(mode=Mode.FACTORED))
    of_tasks = Candidates.of(network, sizes, table.shared_alone, profile, Workload())
    with pytest.raises(Impossible):
        solve(of_tasks, Constraints())


def test_what_was_imported_is_served_while_the_shared_part_follows(
    teacher: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = imported(teacher, images, "family")
    monkeypatch.setattr("learngenes.training.condense.import_dense", None)  # not a second time
    after = condensed(teacher, images, "family")
    assert after.quality == before.quality
    assert after.manifest.imported_order == before.manifest.imported_order
    assert after.imported is not None
    assert before.imported is not None
    torch.testing.assert_close(after.imported.stacked(), before.imported.stacked())
    torch.testing.assert_close(after.stem.state_dict(), before.stem.state_dict(), rtol=0, atol=0)
    assert after.made(after.imported, before.fingerprint), "its models outlive new U and V"
    assert not after.made(after.scales, before.fingerprint)
    table = calibrate(after, RetrainingConfig(steps=2), points=2)
    assert (table.depths, sorted(table.imported)) == ((2, 4), [2, 4])
    assert table.loss_ratio(Mode.DENSE, DType.INT8) != table.loss_ratio(
        Mode.MATERIALISED, DType.INT8
    )


def test_another_teacher_or_other_sizes_are_imported_anew(
    family: Family, teacher: Path, images: Path
) -> None:
    first = imported(teacher, images, "family")
    fewer = config_file(images, {"sizes.depths": [2, 4]})
    run(*words_for(teacher, fewer, "family"), "--import-only")
    assert load_family(images.parent / "family").manifest.sizes.depths == (2, 4)
    with torch.no_grad():
        family.scales.sigma[Kind.QKV].mul_(2)
    export_model(family, family.scales, teacher)
    second = imported(teacher, images, "family")
    assert first.imported is not None
    assert second.imported is not None
    assert not torch.equal(second.imported.weight[Kind.QKV], first.imported.weight[Kind.QKV])
    assert torch.equal(second.imported.weight[Kind.O], first.imported.weight[Kind.O])


def test_what_shares_nothing_yet_has_no_previews(teacher: Path, images: Path) -> None:
    imported(teacher, images, "family")
    refusal = run("previews", str(images.parent / "family"), exit_code=1).stderr
    assert "shares nothing yet" in refusal


def test_a_family_without_imported_layers_says_so(family: Family) -> None:
    with pytest.raises(ValueError, match="no imported layers"):
        family.own_of(family.full_size, Mode.DENSE, DType.FLOAT32)
    with pytest.raises(ValueError, match="mode dense is for models of imported layers"):
        family.assemble(family.scales, Mode.DENSE)


def test_distillation_goes_on_where_it_was_killed(
    teacher: Path, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = condensed(teacher, images, "whole")
    with monkeypatch.context() as killed:
        interrupted = Mock(side_effect=KeyboardInterrupt)
        killed.setattr("learngenes.training.condense.write_family", interrupted)
        first = CliRunner().invoke(cli, words_for(teacher, config_file(images), "again"))
    assert isinstance(first.exception, KeyboardInterrupt | SystemExit)
    monkeypatch.setattr("learngenes.training.condense.fit_all", None)  # is not fitted a second time
    again = condensed(teacher, images, "again")
    torch.testing.assert_close(again.genes.state_dict(), whole.genes.state_dict())


def test_what_cannot_be_condensed_says_why(teacher: Path, images: Path) -> None:
    def refusal(source: Path, settings: Settings | None = None, more: str = "") -> str:
        config = config_file(images, settings)
        config.write_text(f"{config.read_text()}\n{more}")
        return run(*words_for(source, config, "none"), exit_code=1).stderr

    assert "not a DiT that diffusers loads" in refusal(images)
    (teacher / "scheduler" / "scheduler_config.json").unlink()
    assert "under [diffusion]" in refusal(teacher)
    stated: Settings = {"diffusion.prediction_type": "epsilon"}
    assert CondensationConfig.read(config_file(images, stated)).diffusion is not None
    assert "sizes.ranks go up to 48, the network's rank is 4" in refusal(teacher, {"rank": 4})
    deep: Settings = {**stated, "sizes.depths": [2, 9]}
    assert "the teacher has 4 layers, and sizes.depths go up to 9" in refusal(teacher, deep)
    assert "network: Extra inputs" in refusal(teacher, more="[network]")
    assert "is not TOML" in refusal(teacher, more="=")
    shutil.rmtree(images / "test")
    assert "no folder 'test'" in refusal(teacher, stated)
    assert not (images.parent / "work-none").exists()
