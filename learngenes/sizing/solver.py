"""From a budget to a plan: the largest size whose predicted memory fits."""

import math
from collections.abc import Iterator

from learngenes.config import Frozen, Mode, NetworkConfig, Size, SizeSpace
from learngenes.sizing.cost import Workload, flops, memory_bytes


class Predicted(Frozen):
    memory_bytes: int
    latency_seconds: float | None
    """None until a worker has measured its device."""


class Plan(Frozen):
    depth: int
    rank: int
    mode: Mode
    dtype: str
    n: int
    """Images in one batch: what the budget was stated for."""
    predicted: Predicted


class Infeasible(ValueError):
    """Nothing fits the budget."""

    def __init__(self, max_mem_bytes: int, nearest: Plan) -> None:
        self.nearest = nearest
        self.nearest_gb = math.ceil(nearest.predicted.memory_bytes / 1e3) / 1e6
        """Rounded up, so that it is feasible when it is sent back."""
        super().__init__(
            f"no size fits into {max_mem_bytes / 1e9:g} GB; the smallest "
            f"(depth {nearest.depth}, rank {nearest.rank}, {nearest.mode}) needs "
            f"{self.nearest_gb:.6f} GB for n={nearest.n}"
        )


def plans(
    network: NetworkConfig,
    sizes: SizeSpace,
    workload: Workload,
    *,
    num_inference_steps: int,
    flops_per_second: float | None,
) -> Iterator[Plan]:
    """Every size in both modes, with its predicted cost."""
    for depth in sizes.depths:
        for rank in sizes.ranks:
            size = Size(depth=depth, rank=rank)
            for mode in Mode:
                latency = None
                if flops_per_second is not None:
                    step = flops(network, size, mode, workload) / flops_per_second
                    latency = step * num_inference_steps
                yield Plan(
                    depth=depth,
                    rank=rank,
                    mode=mode,
                    dtype="float32",
                    n=workload.n,
                    predicted=Predicted(
                        memory_bytes=memory_bytes(network, size, mode, workload),
                        latency_seconds=latency,
                    ),
                )


def solve(
    network: NetworkConfig,
    sizes: SizeSpace,
    max_mem_bytes: int,
    workload: Workload,
    *,
    num_inference_steps: int = 25,
    flops_per_second: float | None = None,
) -> Plan:
    """The largest depth x rank that fits; among equals the deeper, then the materialised.

    Raises Infeasible, with the nearest feasible plan, when nothing fits.
    """
    everything = list(
        plans(
            network,
            sizes,
            workload,
            num_inference_steps=num_inference_steps,
            flops_per_second=flops_per_second,
        )
    )
    fitting = [plan for plan in everything if plan.predicted.memory_bytes <= max_mem_bytes]
    if not fitting:
        nearest = min(everything, key=lambda plan: plan.predicted.memory_bytes)
        raise Infeasible(max_mem_bytes, nearest)
    return max(fitting, key=lambda p: (p.depth * p.rank, p.depth, p.mode is Mode.MATERIALISED))
