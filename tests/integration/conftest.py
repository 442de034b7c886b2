"""A deployment of its own for each test: real processes, on a free port."""

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import httpx
import pytest

FAMILIES = Path(__file__).parent.parent.parent / "families"
FINESERVE = str(Path(sys.executable).parent / "fineserve")
T = TypeVar("T")
JSON = dict[str, object]


class Deployment:
    def __init__(self, var: Path, families: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.var = var
        self.environment = {
            **os.environ,
            "FINESERVE_VAR_DIR": str(var),
            "FINESERVE_FAMILIES_DIR": str(families),
            "FINESERVE_PORT": str(port),
            "FINESERVE_LEASE_SECONDS": "3",
            "FINESERVE_RETRAINING_STEPS": "1500",
            "FINESERVE_PROFILE_SECONDS": "2",
            "FINESERVE_VERIFY_SECONDS": "1",
            "FINESERVE_COMPILE": "false",
            "OMP_NUM_THREADS": "1",
        }
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60)

    def run(self, command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            [FINESERVE, command], env=self.environment, capture_output=True, text=True, check=False
        )

    def pids(self, text: str = "") -> list[int]:
        """Processes of this deployment whose command has `text`."""
        found = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                environment = (entry / "environ").read_bytes()
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if f"FINESERVE_VAR_DIR={self.var}\0".encode() in environment and text in command:
                found.append(int(entry.name))
        return found

    def model(self, max_mem_gb: float = 4) -> str:
        answer = self.http.post("/models", json={"max_mem_gb": max_mem_gb})
        assert answer.status_code == 202, answer.text
        return str(answer.json()["id"])

    def wait_model(self, model_id: str, done: Callable[[JSON], bool]) -> JSON:
        def look() -> JSON | None:
            model: JSON = self.http.get(f"/models/{model_id}").json()
            return model if done(model) else None

        return wait(look)

    def events(self, model_id: str) -> list[str]:
        text = self.http.get(f"/models/{model_id}/events").text
        return [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]


def wait(look: Callable[[], T | None], seconds: float = 180) -> T:
    """What it finds in the end: a busy machine needs longer than an idle one."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if (found := look()) is not None:
            return found
        time.sleep(0.05)
    raise AssertionError(f"nothing after {seconds} s")


@contextlib.contextmanager
def temporary(families: Path) -> Iterator[Deployment]:
    """Not started; gone afterwards with all that it has started."""
    deployment = Deployment(Path(tempfile.mkdtemp(prefix="fineserve-")), families)
    try:
        yield deployment
    finally:
        deployment.http.close()
        for pid in deployment.pids():
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(deployment.var, ignore_errors=True)


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
