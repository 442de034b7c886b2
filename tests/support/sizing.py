"""Made-up quality tables and profiles for any network and sizes, without torch."""

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from learngenes.config import (
    SHARED_MODES,
    DiffusionConfig,
    DType,
    Mode,
    NetworkConfig,
    Sampling,
    Scheduler,
    Size,
    SizeSpace,
    executable,
)
from learngenes.sizing.cost import Execution, dense_parameters, learngene_parameters
from learngenes.sizing.profile import DeviceProfile, LayerCost
from learngenes.sizing.quality import Pictures, PictureTable, QualityTable

NETWORK = NetworkConfig(
    sample_size=8,
    in_channels=3,
    patch_size=2,
    width=32,
    num_attention_heads=4,
    num_classes=5,
    depth=4,
    rank=48,
)
SIZES = SizeSpace(depths=(2, 3, 4), ranks=(8, 24, 48))
"""Sizes of the family `tiny`."""
EXECUTIONS = [(mode, dtype) for mode in SHARED_MODES for dtype in DType if executable(mode, dtype)]
SLOWDOWN = {
    DType.FLOAT32: 1.0,
    DType.BFLOAT16: 1.3,
    DType.INT8: 1.7,
    DType.INT4: 1.8,
    DType.INT3: 1.9,
}
ROWS = (1, 4, 16)
SECONDS_PER_PRODUCT = 1e-11
BLOCK_SECONDS = 1e-4
"""Seconds that one block takes whatever is in it."""


def untrained_manifest(
    name: str, network: NetworkConfig, class_names: Sequence[str]
) -> dict[str, object]:
    """Manifest of a family of any size that has been trained for one step."""
    return {
        "name": name,
        "network": network,
        "diffusion": DiffusionConfig(),
        "sizes": SIZES,
        "class_names": class_names,
        "licence": "made by a test",
        "trained_steps": 1,
    }


def executions(native_bfloat16: bool = False, packing_threads: int = 0) -> list[Execution]:
    """Executions of all five kinds."""
    return [Execution(mode, dtype, native_bfloat16, packing_threads) for mode, dtype in EXECUTIONS]


def quality_table(sizes: SizeSpace, **changes: Any) -> QualityTable:
    """Losses that fall with depth and with rank, and rise a little with narrower storage."""
    losses = tuple(tuple(1 / depth + 10 / rank for rank in sizes.ranks) for depth in sizes.depths)
    table = QualityTable(
        depths=sizes.depths,
        ranks=sizes.ranks,
        unretrained=tuple(tuple(1.1 * loss for loss in row) for row in losses),
        retrained=losses,
        dtype_loss_ratios={
            DType.FLOAT32: 1.0,
            DType.BFLOAT16: 1.001,
            DType.INT8: 1.01,
            DType.INT4: 1.02,
            DType.INT3: 1.05,
        },
        materialised_loss_ratios={DType.INT8: 1.01, DType.INT4: 1.04},
        source="made up",
    )
    return table.model_copy(update=changes)


GUIDE = Size(depth=2, rank=8)


def pictures(sizes: SizeSpace) -> Pictures:
    """Distances that fall with depth, rank and steps, and by guidance; half of them by a guide."""
    kinds: list[tuple[float, dict[str, Any]]] = [
        (1.0, {"guidance_scale": 1.0}),
        (0.8, {"guidance_start": 0.2, "guidance_stop": 0.8}),
        (0.7, {"guide": GUIDE}),
    ]

    def table(steps: int, factor: float, guidance: dict[str, Any]) -> PictureTable:
        sampling = Sampling(num_inference_steps=steps, scheduler=Scheduler.DPMSOLVER, **guidance)
        return PictureTable(
            sampling=sampling,
            distances=tuple(
                tuple(
                    100 + factor * (400 / depth + 2000 / rank + 1000 / steps)
                    for rank in sizes.ranks
                )
                for depth in sizes.depths
            ),
            accuracies=tuple(
                tuple(1 - 1 / (depth + rank + steps) for rank in sizes.ranks)
                for depth in sizes.depths
            ),
        )

    return Pictures(
        floor=90.0,
        count=5000,
        tables=tuple(table(steps, *kind) for steps in (5, 10, 20) for kind in kinds),
        heldout_error=0.01,
        source="made up",
    )


def device_profile(network: NetworkConfig, sizes: SizeSpace, **changes: Any) -> DeviceProfile:
    """Profile of a device whose time goes into products, more of it with narrower storage."""
    products = {
        Mode.FACTORED: [learngene_parameters(network, rank) for rank in sizes.ranks],
        Mode.MATERIALISED: [dense_parameters(network, 1)],
    }

    def seconds(parameters: int, rows: int, dtype: DType) -> float:
        multiplying = parameters * network.tokens * rows * SECONDS_PER_PRODUCT
        return SLOWDOWN[dtype] * (BLOCK_SECONDS + multiplying)

    profile = DeviceProfile(
        device_class="a-device",
        torch_version="2.0",
        family="tiny",
        family_fingerprint="a-family",
        measured_at=datetime(2026, 1, 1, tzinfo=UTC),
        native_bfloat16=False,
        process_base_bytes=200_000_000,
        request_seconds=0.001,
        layers=tuple(
            LayerCost(
                mode=mode,
                dtype=dtype,
                rows=ROWS,
                ranks=sizes.ranks if mode is Mode.FACTORED else (1,),
                step_seconds=tuple(0.0005 + 0.0001 * rows for rows in ROWS),
                seconds=tuple(
                    tuple(seconds(int(parameters), rows, dtype) for rows in ROWS)
                    for parameters in products[mode]
                ),
            )
            for mode, dtype in EXECUTIONS
        ),
        p95_ratio=1.2,
    )
    return profile.model_copy(update=changes)


def with_imported(profile: DeviceProfile) -> DeviceProfile:
    """The same device with imported layers, which are executed as what is written out."""
    written = [cost for cost in profile.layers if cost.mode is Mode.MATERIALISED]
    dense = [cost.model_copy(update={"mode": Mode.DENSE}) for cost in written]
    return profile.model_copy(update={"layers": (*profile.layers, *dense)})
