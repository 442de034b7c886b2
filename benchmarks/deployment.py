"""A fresh clone of this repository, started with `make up` and used over HTTP."""

import base64
import io
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from PIL import Image

from benchmarks.local import free_port

REPOSITORY = Path(__file__).parent.parent


class Deployment:
    """Everything happens in a clone in a temporary directory, with its own virtual environment."""

    def __init__(self) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="fineserve-clone-"))
        subprocess.run(["git", "clone", "--quiet", str(REPOSITORY), str(self.path)], check=True)
        port = free_port()
        self.environment = {
            name: value
            for name, value in os.environ.items()
            if not name.startswith(("FINESERVE_", "VIRTUAL_ENV", "MAKE"))
        } | {"FINESERVE_PORT": str(port)}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=600)

    def make(self, target: str) -> float:
        """Seconds that `make TARGET` took. Raises CalledProcessError."""
        started = time.perf_counter()
        subprocess.run(["make", target], cwd=self.path, env=self.environment, check=True)
        return time.perf_counter() - started

    def fineserve(self, *words: str) -> None:
        """Run a command of the clone's own. Raises CalledProcessError."""
        command = [str(self.path / ".venv" / "bin" / "fineserve"), *words]
        subprocess.run(command, cwd=self.path, env=self.environment, check=True)

    def remove(self) -> None:
        self.http.close()
        shutil.rmtree(self.path)

    def model(self, max_mem_gb: float) -> str:
        answer = self.http.post("/models", json={"max_mem_gb": max_mem_gb}).raise_for_status()
        return str(answer.json()["id"])

    def wait_model(self, model_id: str, done: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        """The model's record once `done` holds of it. Raises RuntimeError when it failed."""
        while True:
            model: dict[str, Any] = self.http.get(f"/models/{model_id}").json()
            if done(model):
                return model
            if model["status"] in ("failed", "cancelled", "deleted"):
                raise RuntimeError(f"model {model_id}: {model}")
            time.sleep(0.05)

    def images(self, model_id: str, **request: Any) -> np.ndarray:
        """uint8 (N, H, W)."""
        answer = self.http.post("/generate", json={"model": model_id, **request})
        pngs = [base64.b64decode(i["b64_png"]) for i in answer.raise_for_status().json()["images"]]
        return np.stack([np.asarray(Image.open(io.BytesIO(png))) for png in pngs])

    def pids(self, text: str = "") -> list[int]:
        """Processes started from the clone whose command has `text`."""
        found = []
        for entry in Path("/proc").iterdir():
            try:
                command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
            if entry.name.isdigit() and str(self.path) in command and text in command:
                found.append(int(entry.name))
        return found
