import math

import pytest
import torch

from learngenes.judging.frechet import FEATURES, Gaussian, frechet_distance, gaussian


def normal(mean: float, std: float, dimensions: int = 3) -> Gaussian:
    return Gaussian(
        torch.full((dimensions,), mean, dtype=torch.float64),
        torch.eye(dimensions, dtype=torch.float64) * std**2,
    )


def test_the_distance_of_normal_distributions_is_known() -> None:
    assert frechet_distance(normal(0, 1), normal(0, 1)) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(normal(0, 1), normal(2, 1)) == pytest.approx(12)
    assert frechet_distance(normal(0, 1), normal(0, 3)) == pytest.approx(3 * (3 - 1) ** 2)


def test_covariances_need_not_commute() -> None:
    a = torch.tensor([[2.0, 0.8], [0.8, 1.0]], dtype=torch.float64)
    b = torch.tensor([[1.0, -0.3], [-0.3, 3.0]], dtype=torch.float64)
    zero = torch.zeros(2, dtype=torch.float64)
    # of 2 x 2 matrices: tr sqrt(M) = sqrt(tr M + 2 sqrt(det M))
    product = a @ b
    root = math.sqrt(product.trace() + 2 * math.sqrt(torch.det(product)))
    expected = float(a.trace() + b.trace()) - 2 * root
    for pair in ((a, b), (b, a)):
        found = frechet_distance(*(Gaussian(zero, covariance) for covariance in pair))
        assert found == pytest.approx(expected)


def test_the_distance_grows_as_images_are_spoiled() -> None:
    generator = torch.Generator().manual_seed(0)
    base = torch.randint(0, 256, (4, 1, 7, 7), generator=generator).repeat_interleave(30, 0)
    images = torch.nn.functional.interpolate(base.float(), (28, 28), mode="bilinear")

    def spoiled(noise: float) -> Gaussian:
        added = noise * torch.randn(images.shape, generator=generator)
        return gaussian((images + added).clamp(0, 255).to(torch.uint8))

    clean = spoiled(2)
    distances = [frechet_distance(clean, spoiled(noise)) for noise in (2, 20, 80)]
    assert distances[0] < distances[1] < distances[2]


def test_grey_images_are_as_good_as_rgb() -> None:
    grey = torch.randint(0, 256, (3, 1, 8, 8), dtype=torch.uint8)
    one, three = gaussian(grey), gaussian(grey.expand(-1, 3, -1, -1))
    assert one.mean.shape == (FEATURES,)
    torch.testing.assert_close(one.mean, three.mean)
