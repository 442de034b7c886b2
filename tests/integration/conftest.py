"""Deployments as real processes, on free ports."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.deployment import FAMILIES, Deployment


def quick(families: Path) -> Deployment:
    """Deployment that starts quickly, and retrains slowly enough to be killed meanwhile."""
    deployment = Deployment(
        families,
        lease_seconds=3,
        retraining_steps=1500,
        profile_seconds=2,
        verify_seconds=1,
        compile="false",
    )
    deployment.environment["OMP_NUM_THREADS"] = "1"
    return deployment


@pytest.fixture
def deployment(families_dir: Path) -> Iterator[Deployment]:
    """Deployment of a family of a few parameters, not started."""
    with quick(families_dir) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """Deployment of `fashion` for all tests, which only add models to it."""
    families = tmp_path_factory.mktemp("families")
    (families / "fashion").symlink_to(FAMILIES / "fashion")
    with quick(families) as deployment:
        for steps in ("RETRAINING_STEPS", "TASK_RETRAINING_STEPS"):
            deployment.environment[f"FINESERVE_{steps}"] = "40"
        deployment.up()
        yield deployment
