"""Models of classes that their family has never seen."""

import copy

import pytest
import torch

from learngenes.config import SHARED_MODES, DType, Mode, Size
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.formats.diffusers import to_diffusers
from learngenes.model.dit import Stem
from learngenes.model.factors import DenseLayers, Own, Scales, own_from_stacked
from learngenes.model.sampling import sample
from learngenes.model.sigma import interpolated
from learngenes.stepping.weights import ModelWeights, SharedWeights
from learngenes.training.refine import RefinementConfig, refine
from learngenes.training.retrain import TASK_RETRAINING, retrain

CLASSES = ("dark", "bright")


@pytest.fixture
def task() -> LabelledImages:
    """Two shades, which a class embedding alone can tell apart."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    noise = torch.randint(0, 20, (60, 3, 8, 8), generator=generator)
    images = (noise + 20 + 200 * labels[:, None, None, None]).to(torch.uint8)
    return LabelledImages(images, labels, CLASSES)


@pytest.fixture
def own(family: Family) -> Scales:
    scales = family.for_task(family.scales, len(CLASSES))
    with torch.no_grad():
        assert scales.classes is not None
        generator = torch.Generator().manual_seed(1)
        scales.classes += torch.randn(scales.classes.shape, generator=generator)
    return scales


def test_a_stem_shares_all_but_its_classes(stem: Stem) -> None:
    table = torch.zeros(3, stem.config.width)
    other = stem.with_classes(table)
    assert other.config.num_classes == 2
    assert other.classes.weight.data_ptr() == table.data_ptr()
    assert other.patch is stem.patch
    assert other.positions is stem.positions
    assert stem.config.num_classes == 5
    assert len(stem.classes.weight) == 6


def test_classes_of_a_task_begin_as_what_all_have_in_common(family: Family) -> None:
    scales = family.for_task(family.scales, 7)
    assert scales.classes is not None
    assert torch.equal(scales.classes, family.stem.classes.weight[-1].repeat(8, 1))
    smaller = interpolated(scales, Size(depth=2, rank=8))
    assert smaller.classes is not None
    assert torch.equal(smaller.classes, scales.classes)
    assert own_from_stacked(scales.stacked()).stacked().keys() == scales.stacked().keys()


def test_retraining_learns_the_classes_and_leaves_the_family_as_it_was(
    family: Family, task: LabelledImages
) -> None:
    before = copy.deepcopy({**family.stem.state_dict(), **family.scales.stacked()})
    scales = family.for_task(family.scales, len(CLASSES))
    config = TASK_RETRAINING.model_copy(update={"steps": 60})
    retrained = retrain(family, scales, config, data=task)
    assert retrained.heldout_loss < retrained.initial_heldout_loss
    dark, bright, _ = scales.classes if scales.classes is not None else ()
    assert not torch.equal(dark, bright)
    after = {**family.stem.state_dict(), **family.scales.stacked()}
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("mode", SHARED_MODES)
@pytest.mark.parametrize("dense", [False, True])
def test_a_batch_knows_the_classes_of_each_model(
    family: Family, own: Scales, task: LabelledImages, mode: Mode, dense: bool
) -> None:
    layers: Own = own
    if dense:
        layers = refine(family, own, RefinementConfig(steps=1, max_seconds=60), data=task).layers
    model = family.assemble(layers, Mode.MATERIALISED if dense else mode)
    shared = SharedWeights(family, DType.FLOAT32)
    weights = ModelWeights.of(shared, layers)
    assert weights.null_class == model.config.num_classes == 2
    assert weights.nbytes >= ModelWeights.bytes_of(shared, layers) > 0
    timesteps, labels = torch.tensor([10, 500, 900]), torch.tensor([1, 1, 1])
    stem = family.stem_of(layers)
    assert torch.equal(stem.classes(labels), weights.class_table[1].expand(3, -1))
    ours, other = (weights.modulations(timesteps, label) for label in (1, 0))
    assert ours.shape == other.shape
    assert not torch.allclose(ours, other)


def test_plain_diffusers_samples_the_same(family: Family, own: Scales) -> None:
    model = family.assemble(own, Mode.MATERIALISED)
    x, timesteps = torch.randn(3, 3, 8, 8), torch.tensor([1, 400, 999])
    labels = torch.tensor([0, 1, 2])
    with torch.no_grad():
        theirs = to_diffusers(model)(x, timestep=timesteps, class_labels=labels).sample
        assert torch.allclose(model(x, timesteps, labels), theirs, atol=1e-4)
    images = sample(model, family.manifest.diffusion, [0, 1], [0, 1], num_inference_steps=2)
    assert images.shape == (2, 3, 8, 8)


def test_a_refined_model_keeps_its_classes(
    family: Family, own: Scales, task: LabelledImages
) -> None:
    refined = refine(family, own, RefinementConfig(steps=3, max_seconds=60), data=task)
    assert isinstance(refined.layers, DenseLayers)
    assert refined.layers.classes is not None
    assert own.classes is not None
    assert torch.equal(refined.layers.classes, own.classes)
    again = own_from_stacked(refined.layers.to(torch.device("cpu")).stacked())
    assert again.classes is not None
