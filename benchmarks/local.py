"""This checkout's own programs as a deployment, with its data in a directory of /tmp."""

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
from typing import Any, TypeVar

import httpx
import redis

BIN = Path(sys.executable).parent
T = TypeVar("T")


class Local:
    """Not started. Sockets have short paths only, hence /tmp."""

    def __init__(self, families: Path, **settings: object) -> None:
        """`settings`: FINESERVE_* without the prefix, in lower case."""
        self.var = Path(tempfile.mkdtemp(prefix="fineserve-"))
        self.port = free_port()
        given = {"var_dir": self.var, "families_dir": families, "port": self.port, **settings}
        self.environment = {
            **os.environ,
            **{f"FINESERVE_{name.upper()}": str(value) for name, value in given.items()},
        }
        self.url = f"http://127.0.0.1:{self.port}"
        self.redis_url = str(settings.get("redis_url", f"unix://{self.var}/valkey.sock"))
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """`fineserve WORDS`."""
        return subprocess.run(
            [str(BIN / "fineserve"), *words],
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
        )

    def up(self) -> None:
        """Raises RuntimeError."""
        done = self.run("up")
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)

    def control(self, *words: str) -> str:
        """`supervisorctl WORDS`."""
        command = [str(BIN / "supervisorctl"), "-c", str(self.var / "supervisord.conf"), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout

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

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, decode_responses=True)

    def ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def model(self, **budget: Any) -> str:
        answer = self.http.post("/models", json=budget or {"max_mem_gb": 4})
        return str(answer.raise_for_status().json()["id"])

    def ready_model(self, **budget: Any) -> str:
        """Raises RuntimeError when it fails."""
        model_id = self.model(**budget)

        def done() -> str | None:
            model = self.http.get(f"/models/{model_id}").json()
            if model["status"] == "failed":
                raise RuntimeError(model["error"])
            return model_id if model["status"] == "ready" else None

        return wait(done, 600)

    def remove(self) -> None:
        self.http.close()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.var, ignore_errors=True)


@contextlib.contextmanager
def started(families: Path, **settings: object) -> Iterator[Local]:
    """Ready; gone afterwards with all that it has started."""
    local = Local(families, **settings)
    try:
        local.up()
        yield local
    finally:
        local.remove()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(look: Callable[[], T | None], seconds: float = 180) -> T:
    """What it finds in the end; False and None are nothing. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"nothing after {seconds} s")
