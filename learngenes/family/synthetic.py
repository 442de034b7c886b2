"""Families of random weights with the shapes of known networks: for sizing, not for seeing."""

from pathlib import Path

import torch

from learngenes.config import DiffusionConfig, DType, Kind, NetworkConfig, SizeSpace
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import RANDOM, FamilyManifest, save_family, write_quality
from learngenes.model.dit import Stem
from learngenes.model.factors import Learngenes
from learngenes.model.sigma import reference_scales
from learngenes.sizing.cost import dense_parameters, stem_parameters
from learngenes.sizing.quality import QualityTable

WIDTHS = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}
"""Width, layers and heads of DiT-S, B, L and XL (arXiv 2212.09748, table 1), which SiT shares
(arXiv 2401.08740)."""
PARTS_OF_A_RANK = 8


def dit(size: str, pixels: int) -> NetworkConfig:
    """DiT of patches of 2 over latents of an eighth of the image's height."""
    width, depth, heads = WIDTHS[size]
    return NetworkConfig(
        sample_size=pixels // 8,
        in_channels=4,
        patch_size=2,
        width=width,
        num_attention_heads=heads,
        num_classes=1000,
        depth=depth,
        rank=width,
    )


def sizes_of(network: NetworkConfig) -> SizeSpace:
    """Every other depth from a seventh on, and eighths of the rank."""
    step = network.rank // PARTS_OF_A_RANK
    return SizeSpace(
        depths=tuple(range(max(2, network.depth // 7), network.depth + 1, 2)),
        ranks=(step // 2, *range(step, network.rank + 1, step)),
    )


def millions(network: NetworkConfig) -> float:
    """Millions of parameters of a network without shared layers."""
    return float(dense_parameters(network, network.depth) + stem_parameters(network)) / 1e6


SHAPES = {f"dit-{size}-2-{pixels}": dit(size, pixels) for size in WIDTHS for pixels in (256, 512)}
"""Networks by the names that people know them by."""
DIT_XL_2 = SHAPES["dit-xl-2-256"]
DIT_XL_2_SIZES = sizes_of(DIT_XL_2)


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
        "licence": RANDOM,
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
