"""What pictures of the family `tiny` are worth to a judge that looks at their colours."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import Tensor

from learngenes.config import Sampling, Scheduler, Size, SizeSpace
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.judging.frechet import Gaussian
from learngenes.sizing.quality import QualityTable
from learngenes.training import pictures as measured
from learngenes.training.calibrate import calibrate
from learngenes.training.pictures import Judge, PicturesConfig, candidates
from learngenes.training.retrain import RetrainingConfig

COUNT = 40
GUIDE = Size(depth=2, rank=8)
BRIEFLY = RetrainingConfig(steps=1, heldout_images=8)
UNGUIDED, GUIDED = (
    Sampling(num_inference_steps=2, scheduler=Scheduler.DPMSOLVER, **guidance)
    for guidance in ({"guidance_scale": 1.0}, {"guide": GUIDE})
)


def colours(images: Tensor) -> Gaussian:
    features = images.double().mean((2, 3))
    return Gaussian(features.mean(0), features.T.cov())


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch, family: Family) -> Judge:
    monkeypatch.setattr(measured, "gaussian", colours)
    monkeypatch.setattr(measured, "CLASSIFIER_IMAGES", 400)
    generator = torch.Generator().manual_seed(0)
    names = family.manifest.class_names
    images = torch.randint(256, (400, 3, 8, 8), generator=generator, dtype=torch.uint8)
    real = LabelledImages(images, torch.arange(400) % len(names), tuple(names))
    return Judge.of(real, real.subset(torch.arange(200)), COUNT)


def calibrated(family: Family, config: PicturesConfig) -> tuple[QualityTable, list[Size]]:
    seen: list[Size] = []
    table = calibrate(
        family, BRIEFLY, 2, pictures=config, on_pictures=lambda size, *_: seen.append(size)
    )
    return table, seen


def test_every_sampling_is_measured_over_the_grid(family: Family, judge: Judge) -> None:
    table, seen = calibrated(family, PicturesConfig(judge, (UNGUIDED, GUIDED), COUNT))
    assert table.pictures is not None
    unguided, guided = table.pictures.tables
    assert (unguided.sampling, guided.sampling) == (UNGUIDED, GUIDED)
    assert (table.depths, table.ranks) == ((2, 4), (8, 48))
    assert guided.distances[0][0] == unguided.distances[0][0], "no size guides itself"
    assert guided.distances[1][1] != unguided.distances[1][1]
    assert table.pictures.floor > 0
    assert table.pictures.heldout_error > 0
    between = Size(depth=3, rank=24)
    assert seen.count(between) == 2
    assert len(seen) == 4 + 3 + 2


def test_a_family_of_one_rank_is_judged_between_its_depths(family: Family, judge: Judge) -> None:
    sizes = SizeSpace(depths=(2, 3, 4), ranks=(48,))
    one_rank = dataclasses.replace(
        family, manifest=family.manifest.model_copy(update={"sizes": sizes})
    )
    table, seen = calibrated(one_rank, PicturesConfig(judge, (UNGUIDED,), COUNT))
    assert seen.count(Size(depth=3, rank=48)) == 1
    assert table.pictures is not None
    assert table.pictures.heldout_error > 0


def test_another_run_goes_on_from_what_is_kept(
    family: Family, judge: Judge, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = PicturesConfig(judge, (UNGUIDED, GUIDED), COUNT, work=tmp_path / "kept.jsonl")
    first, _ = calibrated(family, config)
    lines = (tmp_path / "kept.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "kept.jsonl").write_text("".join(lines[:-2]))
    made: list[Sampling] = []
    sampled = measured.sampled
    monkeypatch.setattr(
        measured, "sampled", lambda *given: made.append(given[2]) or sampled(*given)
    )
    again, _ = calibrated(family, config)
    assert again == first
    assert len(made) == 2


def test_the_shallowest_size_is_the_guide_that_is_tried(family: Family) -> None:
    tried = candidates(family.manifest.sizes, family.full_size)
    assert {sampling.guide for sampling in tried} == {None, Size(depth=2, rank=48)}
    assert {sampling.scheduler for sampling in tried} == {Scheduler.DPMSOLVER}
    longest = [len(each.guided) for each in tried if each.num_inference_steps == 12]
    assert longest == [0, 7, 12]


def test_real_images_of_other_classes_are_refused(family: Family, tmp_path: Path) -> None:
    from PIL import Image

    from learngenes.data.images import DataError

    for split in ("train", "test"):
        (tmp_path / split / "other").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / split / "other" / "0.png")
        (tmp_path / split / "another").mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / split / "another" / "0.png")
    with pytest.raises(DataError, match="has other classes than the family tiny"):
        measured.pictures_config(family, tmp_path)
