"""Muon for some matrices, AdamW for everything else, as one optimizer.

Muon (Jordan et al. 2024, `kellerjordan.github.io/posts/muon`) makes the momentum of a matrix
orthogonal: a step changes all of its singular directions alike.
"""

import torch
from torch import Tensor

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5


class Muon(torch.optim.AdamW):
    """AdamW, but groups with `"orthogonal": True` are matrices that take Muon's step.

    In float32: torch 2.13's own Muon begins with `grad.bfloat16()` and has no option for it, and a
    CPU that has to emulate that takes 32 times as long (384 x 384 on one thread, held to AVX2).
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if group.get("orthogonal"):
                for matrix in group["params"]:
                    if matrix.grad is not None:
                        self._orthogonal_step(matrix, group["lr"])
                        matrix.grad = None  # so AdamW leaves it alone
        super().step(closure)

    def _orthogonal_step(self, matrix: Tensor, learning_rate: float) -> None:
        state, (rows, columns) = self.state[matrix], matrix.shape
        if not state:  # AdamW's names: it reads the state of every parameter back
            state["step"], state["exp_avg"] = torch.zeros(()), torch.zeros_like(matrix)
        state["step"] += 1
        state["exp_avg"].lerp_(matrix.grad, 1 - MOMENTUM)
        ahead = matrix.grad.lerp(state["exp_avg"], MOMENTUM)  # type: ignore[union-attr]
        matrix.sub_(learning_rate * max(1, rows / columns) ** 0.5 * orthogonal(ahead))


def orthogonal(matrix: Tensor) -> Tensor:
    """Matrix (m, n) with the same singular vectors, and singular values of about 0.7 to 1.2."""
    a, b, c = NEWTON_SCHULZ
    x: Tensor = matrix / matrix.norm().clamp(min=1e-7)
    if transposed := x.shape[0] > x.shape[1]:
        x = x.T
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if transposed else x
