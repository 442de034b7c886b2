"""A deployment to measure or to test: real processes on a free port, with data of their own."""

import contextlib
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import redis
from PIL import Image

from benchmarks.parts import REPOSITORY
from fineserve.client import FINISHED, Client, GeneratedImage
from fineserve.wire import ModelResponse

FAMILIES = REPOSITORY / "families"
CHROMIUM = "/usr/bin/chromium"
"""Of Debian's package, which `make test-browser` installs."""
T = TypeVar("T")


class Deployment:
    """This checkout's own programs; not started. Gone after a `with`, with all that it started."""

    root = REPOSITORY
    bin = Path(sys.executable).parent

    def __init__(self, families: Path = FAMILIES, var: Path | None = None, **settings: Any):
        """`settings`: FINESERVE_* without the prefix, in lower case."""
        # sockets have short paths only, hence /tmp
        self.var = var or Path(tempfile.mkdtemp(prefix="fineserve-"))
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.redis_url = str(settings.get("redis_url", f"unix://{self.var}/valkey.sock"))
        given = {"var_dir": self.var, "families_dir": families, "port": port, **settings}
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith("MAKE")}
        self.environment |= {f"FINESERVE_{k.upper()}": str(v) for k, v in given.items()}
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.client = Client(self.url)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.http.close()
        self.client.close()
        for pid in self.pids():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.var, ignore_errors=True)

    def run(self, *words: str) -> "subprocess.CompletedProcess[str]":
        """`fineserve WORDS`."""
        return self._run(str(self.bin / "python"), "-m", "fineserve", *words)

    def control(self, *words: str) -> str:
        """`supervisorctl WORDS`."""
        file = str(self.var / "supervisord.conf")
        return self._run(str(self.bin / "supervisorctl"), "-c", file, *words).stdout

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            command,
            cwd=self.root,
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

    def ready(self) -> bool:
        try:
            return self.http.get("/readyz").status_code == 200
        except httpx.HTTPError:
            return False

    def pids(self, text: str = "") -> list[int]:
        """Processes of this deployment whose command has `text`."""
        mark = f"FINESERVE_VAR_DIR={self.var}".encode()
        return [pid for pid, command in marked(mark) if text in command]

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url, decode_responses=True)

    def ready_model(self, **budget: Any) -> str:
        """Raises NotReady when it fails."""
        return self.client.wait(self.client.create_model(**budget or {"max_mem_gb": 4}).id).id

    def wait_model(
        self, model_id: str, done: Callable[[ModelResponse], bool], seconds: float = 600
    ) -> ModelResponse:
        """The model once `done` holds of it. Raises RuntimeError when it never will."""

        def look() -> ModelResponse | None:
            model = self.client.model(model_id)
            if done(model):
                return model
            if model.status in FINISHED:
                raise RuntimeError(f"model {model_id} is {model.status}: {model.error}")
            return None

        return wait(look, seconds)

    def events(self, model_id: str) -> list[str]:
        """Contents, as JSON, of all events of a model that has ended."""
        text = self.http.get(f"/models/{model_id}/events").text
        return [line.removeprefix("data: ") for line in text.splitlines() if "data: " in line]


class FreshClone(Deployment):
    """A deployment of a fresh clone of this repository, with its own virtual environment."""

    def __init__(self, **settings: Any) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="fineserve-clone-"))
        self.bin = self.root / ".venv" / "bin"
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(self.root)], check=True)
        super().__init__(self.root / "families", self.root / "var", **settings)
        self.environment.pop("VIRTUAL_ENV", None)

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self.root)

    def up(self) -> None:
        self.make("up")

    def make(self, target: str) -> float:
        """Seconds that `make TARGET` took. Raises CalledProcessError."""
        started = time.perf_counter()
        subprocess.run(["make", target], cwd=self.root, env=self.environment, check=True)
        return time.perf_counter() - started


def pixels(images: Sequence[GeneratedImage]) -> np.ndarray:
    """uint8 (N, H, W), or (N, H, W, 3)."""
    return np.stack([np.asarray(Image.open(io.BytesIO(image.png))) for image in images])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def marked(variable: bytes) -> list[tuple[int, str]]:
    """Id and command of every process that inherited NAME=VALUE: a group may be left, this not."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable in (entry / "environ").read_bytes().split(b"\0"):
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                found.append((int(entry.name), command))
    return found


def wait(look: Callable[[], T | None], seconds: float = 180) -> T:
    """Result of `look`, asked again while it is False or None. Raises TimeoutError."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise TimeoutError(f"nothing after {seconds} s")
