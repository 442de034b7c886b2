"""A deployment of its own for each test: real processes, on a free port."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.local import Local, wait

FAMILIES = Path(__file__).parent.parent.parent / "families"
JSON = dict[str, object]


class Deployment(Local):
    """Quick to start, and slow enough in retraining to be killed in the middle of it."""

    def __init__(self, families: Path) -> None:
        super().__init__(
            families,
            lease_seconds=3,
            retraining_steps=1500,
            profile_seconds=2,
            verify_seconds=1,
            compile="false",
        )
        self.environment["OMP_NUM_THREADS"] = "1"

    def wait_model(self, model_id: str, done: Callable[[JSON], bool]) -> JSON:
        def look() -> JSON | None:
            model: JSON = self.http.get(f"/models/{model_id}").json()
            return model if done(model) else None

        return wait(look)

    def events(self, model_id: str) -> list[str]:
        text = self.http.get(f"/models/{model_id}/events").text
        return [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]


@contextlib.contextmanager
def temporary(families: Path) -> Iterator[Deployment]:
    """Not started; gone afterwards with all that it has started."""
    deployment = Deployment(families)
    try:
        yield deployment
    finally:
        deployment.remove()


@pytest.fixture
def deployment(families_dir: Path) -> Iterator[Deployment]:
    """Not started, with a family of a few parameters."""
    with temporary(families_dir) as deployment:
        yield deployment


@pytest.fixture(scope="session")
def shipped() -> Iterator[Deployment]:
    """With the shipped family; one for all tests, which only add models to it."""
    with temporary(FAMILIES) as deployment:
        deployment.environment |= {"FINESERVE_RETRAINING_STEPS": "40"}
        up = deployment.run("up")
        assert up.returncode == 0, up.stdout + up.stderr
        yield deployment
