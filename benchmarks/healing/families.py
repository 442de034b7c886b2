"""Two families, trained in the setting of the paper, and what they are judged by."""

from collections.abc import Callable

from benchmarks.form import quality
from benchmarks.paper.ancestors import trained_family
from benchmarks.parts import REPOSITORY
from learngenes.config import NetworkConfig, SizeSpace
from learngenes.data import labelled
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import Family
from learngenes.training.config import DataConfig, PretrainingConfig, TrainingConfig

WORK = REPOSITORY / "var" / "healing"
EMOJI = DataConfig(
    path=REPOSITORY / "var" / "data" / "emoji",
    limited_images=900,
    heldout_images=270,
    licence="Noto Emoji, Copyright Google Inc., Apache-2.0",
)
Trained = Callable[[], tuple[Family, LabelledImages, LabelledImages]]
"""Gives a family, the images that it learns from, and those that it is judged by."""


def fashion() -> tuple[Family, LabelledImages, LabelledImages]:
    """The form that was chosen, of the first seed."""
    splits = quality.lab().ancestors.splits
    return quality.trained(quality.SEEDS[0]), splits.training, splits.heldout


def emoji() -> tuple[Family, LabelledImages, LabelledImages]:
    """Emoji at the width of the paper's setting, in half as many steps."""
    width = 64
    config = PretrainingConfig(
        name="emoji-small",
        data=EMOJI,
        network=NetworkConfig(
            sample_size=32,
            in_channels=3,
            patch_size=8,
            width=width,
            num_attention_heads=4,
            num_classes=9,
            depth=12,
            rank=8 * width,
        ),
        sizes=SizeSpace(depths=(2, 4, 8, 12), ranks=(8 * width,)),
        training=TrainingConfig(steps=4000, batch_size=32, healing_steps=0),
    )
    family = trained_family(config, WORK / "work-emoji", WORK / "emoji")
    return family, *_images()


def _images() -> tuple[LabelledImages, LabelledImages]:
    train = labelled.load(EMOJI.path, "train", EMOJI.class_names, 32)
    test = labelled.load(EMOJI.path, "test", EMOJI.class_names, 32)
    return train, test.balanced(EMOJI.heldout_images)


FAMILIES: dict[str, Trained] = {"fashion": fashion, "emoji": emoji}
