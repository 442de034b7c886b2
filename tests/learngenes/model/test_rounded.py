import pytest
import torch

from learngenes.model.rounded import Rounded, codes_and_scales, nearest, straight_through
from learngenes.sizing.cost import rounded_bytes

SHAPES = [(7, 64), (5, 50), (96, 32)]


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_matrix_comes_back_as_near_as_its_bits_allow(shape: tuple[int, int], bits: int) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    kept = Rounded(matrix, bits)
    error = (kept.unpacked(torch.float32) - matrix).square().mean() ** 0.5
    assert error < {3: 0.25, 4: 0.12, 8: 0.008}[bits]
    assert sum(b.nbytes for b in kept.buffers()) == rounded_bytes(*shape, bits)
    assert kept.unpacked(torch.bfloat16).dtype == torch.bfloat16


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_every_level_is_of_use_and_exact(bits: int) -> None:
    levels = 2**bits
    codes = torch.arange(levels).repeat(32)
    matrix = ((codes - levels / 2 + 0.5) * 0.25).view(-1, 32)
    matrix[:, 0] = (levels / 2 - 0.5) * 0.25  # each group has its largest
    kept = Rounded(matrix, bits)
    torch.testing.assert_close(kept.unpacked(torch.float32), matrix)


def test_an_outlier_is_clipped_where_that_is_nearer() -> None:
    matrix = torch.full((1, 32), 0.1)
    matrix[0, 0] = 0.2
    _, scales = codes_and_scales(matrix, 3)
    assert scales[0, 0] < 0.2 / 3.5


def test_zeros_stay_next_to_zero() -> None:
    assert Rounded(torch.zeros(2, 32), 4).unpacked(torch.float32).abs().max() < 1e-9


def test_several_matrices_are_rounded_as_each_alone() -> None:
    torch.manual_seed(0)
    several = torch.randn(3, 5, 50)
    alone = [Rounded(matrix, 4).unpacked(torch.float32) for matrix in several]
    torch.testing.assert_close(nearest(several, 4), torch.stack(alone), rtol=0, atol=0)


def test_a_gradient_goes_through_rounding_as_if_there_were_none() -> None:
    matrix = torch.randn(4, 32, requires_grad=True)
    rounded = straight_through(matrix, 3)
    torch.testing.assert_close(rounded, nearest(matrix, 3))
    (rounded * torch.arange(32)).sum().backward()
    torch.testing.assert_close(matrix.grad, torch.arange(32.0).expand(4, 32))
