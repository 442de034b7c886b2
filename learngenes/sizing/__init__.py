"""Sizing: a cost model and a solver in pure Python, importable where there is no torch."""

from learngenes.config import Mode, NetworkConfig, Size, SizeSpace
from learngenes.sizing.cost import Workload, memory_bytes, weight_bytes
from learngenes.sizing.solver import Infeasible, Plan, Predicted, solve

__all__ = [
    "Infeasible",
    "Mode",
    "NetworkConfig",
    "Plan",
    "Predicted",
    "Size",
    "SizeSpace",
    "Workload",
    "memory_bytes",
    "solve",
    "weight_bytes",
]
