"""Families of random weights with the shapes of known networks: for sizing, not for seeing."""

from pathlib import Path

import torch

from learngenes.config import DiffusionConfig, DType, Kind, NetworkConfig, SizeSpace
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import FamilyManifest, save_family, write_quality
from learngenes.model.dit import Stem
from learngenes.model.factors import Learngenes
from learngenes.model.sigma import reference_scales
from learngenes.sizing.quality import QualityTable

DIT_XL_2 = NetworkConfig(
    sample_size=32,
    in_channels=4,
    patch_size=2,
    width=1152,
    num_attention_heads=16,
    num_classes=1000,
    depth=28,
    rank=1152,
)
"""DiT-XL/2 at 256 x 256: 256 tokens of a latent (arXiv 2212.09748, table 1)."""
DIT_XL_2_SIZES = SizeSpace(
    depths=tuple(range(4, 29, 2)), ranks=(72, 144, 288, 432, 576, 720, 864, 1008, 1152)
)


def write_synthetic_family(
    directory: Path, network: NetworkConfig = DIT_XL_2, sizes: SizeSpace = DIT_XL_2_SIZES
) -> FamilyManifest:
    """Write a family in which nothing was trained or measured."""
    torch.manual_seed(0)
    class_names = tuple(f"class {i}" for i in range(network.num_classes))
    scales = reference_scales(network)
    torch.nn.init.normal_(scales.sigma[Kind.ADALN], std=0.1)  # else every block is the identity
    shape = (20, network.in_channels, network.sample_size, network.sample_size)
    images = LabelledImages(
        torch.randint(0, 256, shape, dtype=torch.uint8),
        torch.arange(20) % network.num_classes,
        class_names,
    )
    manifest = {
        "name": directory.name,
        "network": network,
        "diffusion": DiffusionConfig(),
        "sizes": sizes,
        "class_names": class_names,
        "licence": "random numbers",
        "trained_steps": 0,
    }
    owns = {network.depth: scales}
    written = save_family(directory, manifest, Learngenes(network), Stem(network), owns, images)
    write_quality(directory, _made_up_quality(sizes))
    return written


def _made_up_quality(sizes: SizeSpace) -> QualityTable:
    losses = tuple(
        tuple(0.1 * (1 + 1 / depth + 50 / rank) for rank in sizes.ranks) for depth in sizes.depths
    )
    return QualityTable(
        depths=sizes.depths,
        ranks=sizes.ranks,
        unretrained=losses,
        retrained=losses,
        dtype_loss_ratios={
            DType.FLOAT32: 1.0,
            DType.BFLOAT16: 1.0001,
            DType.INT8: 1.001,
            DType.INT4: 1.01,
            DType.INT3: 1.05,
        },
        materialised_loss_ratios={DType.INT8: 1.001, DType.INT4: 1.03},
        source="a formula, not a measurement: the weights are random",
    )
