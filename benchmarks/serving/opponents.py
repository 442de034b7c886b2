"""Starts one of the servers of `peers/`, and ends all of its processes."""

import os
import signal
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.deployment import free_port, marked, wait
from benchmarks.parts import REPOSITORY

PYTHON = REPOSITORY / ".venv-peers" / "bin" / "python"
HEALTH = {
    "plain": "/healthz",
    "litserve": "/health",
    "ray_serve": "/healthz",
    "bentoml": "/readyz",
}
"""The opponents, and where each says that it is ready."""
SILENT = {
    "BENTOML_DO_NOT_TRACK": "True",
    "DO_NOT_TRACK": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
}
"""No framework reports its use, nor looks for anything elsewhere."""
MARK = "FINESERVE_BENCH_PEER"
"""Variable that every process of one server inherits: Ray's leave the process group."""
STOP_SECONDS = 20.0


class PeerError(RuntimeError):
    """A server ended, or did not become ready; the message has the end of its log."""


def body(name: str, request: dict[str, object]) -> dict[str, object]:
    """What opponent `name` is sent for one request: BentoML batches lists."""
    return {"requests": [request]} if name == "bentoml" else request


@dataclass(frozen=True)
class Opponent:
    url: str
    token: str

    def pids(self) -> list[int]:
        return _marked(self.token)


@contextmanager
def running(
    name: str,
    models: Path,
    *,
    dtype: str = "float32",
    compiled: bool = False,
    threads: int = 2,
    start_seconds: float = 900.0,
    **settings: object,
) -> Iterator[Opponent]:
    """Opponent `name`, which holds all of `models`, until the block ends.

    `settings` are further fields of `benchmarks.serving.peers.pipeline.Settings`. Compiling is
    part of the start, hence the long `start_seconds`. Raises PeerError.
    """
    port = free_port()
    token = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="peer-", ignore_cleanup_errors=True) as scratch:
        settings |= {"models": models.resolve(), "port": port, "dtype": dtype}
        settings |= {"compile": int(compiled), "threads": threads}
        environment = (
            {name: value for name, value in os.environ.items() if not name.startswith("PEER_")}
            | {f"PEER_{field.upper()}": str(value) for field, value in settings.items()}
            | {"OMP_NUM_THREADS": str(threads), "TMPDIR": scratch, "RAY_TMPDIR": scratch}
            | {"BENTOML_HOME": f"{scratch}/bentoml", MARK: token}
            | SILENT
        )
        log = Path(scratch) / "log"
        process = _start(name, environment, log)
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_ready(process, url + HEALTH[name], log, start_seconds)
            yield Opponent(url, token)
            if process.poll() is not None:
                raise PeerError(f"{name} ended with {process.returncode}:\n{_tail(log)}")
        finally:
            _stop(process, token)


def _start(name: str, environment: dict[str, str], log: Path) -> subprocess.Popen[bytes]:
    command = [str(PYTHON), "-m", f"benchmarks.serving.peers.{name}"]
    with log.open("wb") as file:
        return subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _wait_ready(
    process: subprocess.Popen[bytes], health: str, log: Path, start_seconds: float
) -> None:
    def ready() -> bool:
        if process.poll() is not None:
            raise PeerError(f"ended with {process.returncode} at its start:\n{_tail(log)}")
        with suppress(httpx.HTTPError):
            return httpx.get(health, timeout=5, trust_env=False).is_success
        return False

    try:
        wait(ready, start_seconds)
    except TimeoutError as error:
        raise PeerError(f"{error}:\n{_tail(log)}") from error


def _stop(process: subprocess.Popen[bytes], token: str) -> None:
    """SIGTERM, for the frameworks to end their own; SIGKILL to the group and all that is left."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    until = time.monotonic() + STOP_SECONDS
    while (left := _marked(token)) and time.monotonic() < until:
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
    process.wait()


def _marked(token: str) -> list[int]:
    return [pid for pid, _ in marked(f"{MARK}={token}".encode())]


@contextmanager
def paused(pids: Sequence[int]) -> Iterator[None]:
    """None of these processes runs within the block: an idle server may still poll."""
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)


def _tail(log: Path, lines: int = 40) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
