import torch
from torch import nn

from learngenes.training.muon import Muon, orthogonal


def test_singular_vectors_stay_and_singular_values_become_alike() -> None:
    torch.manual_seed(0)
    matrices = [torch.randn(shape) for shape in ((6, 4), (4, 6), (5, 5), (4, 6))]
    for matrix, stepped in zip(matrices, orthogonal(matrices), strict=True):
        u, before, vt = torch.linalg.svd(matrix, full_matrices=False)
        made = u.T @ stepped @ vt.T
        after = made.diagonal()
        torch.testing.assert_close(made, torch.diag(after), atol=0.03, rtol=0)
        assert before.max() / before.min() > 2
        assert 0.6 < after.min() <= after.max() < 1.3


def test_matrices_step_by_muon_and_the_rest_by_adamw() -> None:
    torch.manual_seed(0)
    matrix, other, frozen = (nn.Parameter(torch.ones(8, 2)) for _ in range(3))
    groups = [{"params": [matrix, frozen], "orthogonal": True}, {"params": [other]}]
    optimizer = Muon(groups, lr=0.1, weight_decay=0.0)
    gradient = torch.randn(8, 2)
    matrix.grad, other.grad = gradient.clone(), gradient.clone()
    optimizer.step()
    step = 0.1 * 2 * orthogonal([gradient])[0]  # sqrt(8 / 2): taller than wide
    torch.testing.assert_close(matrix.data, 1 - step)
    torch.testing.assert_close(other.data, 1 - 0.1 * gradient.sign())
    assert torch.equal(frozen.data, torch.ones(8, 2))


def test_momentum_goes_on_where_gradients_turn_small() -> None:
    torch.manual_seed(0)
    matrix = nn.Parameter(torch.zeros(4, 4))
    optimizer = Muon([{"params": [matrix], "orthogonal": True}], lr=0.1, weight_decay=0.0)
    gradient = torch.randn(4, 4)
    for scale in (1, 1e-3):
        before = matrix.detach().clone()
        matrix.grad = gradient * scale
        optimizer.step()
        moved = (matrix.detach() - before) * gradient
        assert moved.sum() < -0.1


def test_a_stack_of_matrices_steps_as_each_of_them_alone() -> None:
    torch.manual_seed(0)
    stack = torch.randn(3, 6, 4)
    (together,) = orthogonal([stack])
    for matrix, stepped in zip(stack, together, strict=True):
        torch.testing.assert_close(stepped, orthogonal([matrix])[0])
