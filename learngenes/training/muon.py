"""Muon for some matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, `kellerjordan.github.io/posts/muon`) makes the momentum of a matrix
orthogonal: a step changes all of its singular directions alike.
"""

from collections import defaultdict
from typing import Any

import torch
from torch import Tensor

from learngenes.device import native_bfloat16

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `"orthogonal": True` take Muon's step: matrices, or stacks of them.

    torch 2.13's own Muon takes one matrix after the other, and always in bfloat16: where a CPU has
    to emulate that, it takes 32 times as long (384 x 384 on one thread, held to AVX2).
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("orthogonal"):
                self._orthogonal_step(group)
        super().step(closure)

    def _orthogonal_step(self, group: dict[str, Any]) -> None:
        matrices = [matrix for matrix in group["params"] if matrix.grad is not None]
        if not matrices:
            return
        for matrix in matrices:
            state = self.state[matrix]
            if not state:  # AdamW's names: it reads the state of every parameter back
                state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(matrix)
            state["step"] += 1
        gradients = [matrix.grad for matrix in matrices]
        momentum = [self.state[matrix]["exp_avg"] for matrix in matrices]
        torch._foreach_lerp_(momentum, gradients, 1 - MOMENTUM)
        ahead = torch._foreach_lerp(gradients, momentum, MOMENTUM)
        for matrix, step in zip(matrices, orthogonal(list(ahead)), strict=True):
            rows, columns = matrix.shape[-2:]
            matrix.sub_(group["lr"] * max(1, rows / columns) ** 0.5 * step)
            matrix.grad = None  # so AdamW leaves it alone


def orthogonal(matrices: list[Tensor]) -> list[Tensor]:
    """Matrices (..., m, n) with the same singular vectors, and singular values of 0.7 to 1.2.

    Those of one shape, either way round, are one batch; in bfloat16 where hardware has it.
    """
    batches: dict[tuple[int, int], list[int]] = defaultdict(list)
    for index, matrix in enumerate(matrices):
        m, n = matrix.shape[-2:]
        batches[min(m, n), max(m, n)].append(index)
    found = list(matrices)
    for (m, n), indices in batches.items():
        flat = [_wide(matrices[index]).reshape(-1, m, n) for index in indices]
        steps = _newton_schulz(torch.cat(flat)).split([len(part) for part in flat])
        for index, step in zip(indices, steps, strict=True):
            shape = matrices[index].shape
            found[index] = (step.mT if shape[-2] > shape[-1] else step).reshape(shape)
    return found


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if matrix.shape[-2] > matrix.shape[-1] else matrix


def _newton_schulz(x: Tensor) -> Tensor:
    """Polar factors of a batch (B, m, n), m <= n, nearly; float32."""
    a, b, c = NEWTON_SCHULZ
    x = x / x.flatten(1).norm(dim=1).clamp(min=1e-7)[:, None, None]
    x = x.to(torch.bfloat16 if native_bfloat16(x.device) else torch.float32)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.float()
