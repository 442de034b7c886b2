"""Check 1: the compose stack through the main job, and the sizes of its images.

The GPU reservation is left out, as docker/cpu.yml does, and so is what can be neither pulled nor
made of Debian's packages: Grafana, whose dashboards a test asks of a real Prometheus instead, and
the exporters.
"""

import functools
import http.server
import ipaddress
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx
import yaml

from benchmarks.deployment import free_port, pixels, wait
from benchmarks.operate.engine import Engine, engine, stand_in
from benchmarks.parts import REPOSITORY, Figures
from fineserve.client import Client

PROJECT = "fineserve-compose-test"
BUILT = ("service", "worker-build")
STARTED = ("redis", "service", "worker-build", "worker-sample", "prometheus")
OPTIONAL = ("grafana", "celery-exporter")
READY_SECONDS = 600


@dataclass(frozen=True)
class Stack:
    """The stack of docker-compose.yml on a Docker engine, built and not yet started."""

    engine: Engine
    compose: Callable[..., str]
    url: str
    prometheus_url: str
    stand_ins: list[str]
    left_out: list[str]
    build_seconds: float

    def up(self) -> None:
        also = [name for name in OPTIONAL if name not in self.left_out]
        self.compose("up", "--detach", "--no-build", *STARTED, *also)


def measure() -> Figures:
    with stack() as made:
        made.up()
        seconds = _main_job(made.url, made.prometheus_url)
        made.compose("exec", "-T", "service", "fineserve", "keys", "list")
        return {
            "compose_main_job_ok": 1,
            "service_image_bytes": made.engine.image_bytes("fineserve-service:local"),
            "worker_image_bytes": made.engine.image_bytes("fineserve-worker:local"),
            "build_seconds": made.build_seconds,
            **seconds,
            "stand_ins": made.stand_ins,
            "left_out": made.left_out,
        }


@contextmanager
def stack() -> Iterator[Stack]:
    """Images built; afterwards everything is taken down, after a failure with its last logs."""
    with tempfile.TemporaryDirectory(prefix="compose-") as directory, engine() as docker:
        stand_ins = stand_in(docker, Path(directory))
        port, prometheus_port = free_port(), free_port()
        docker.environment |= {
            "FINESERVE_PORT": str(port),
            "PROMETHEUS_PORT": str(prometheus_port),
            "GRAFANA_PASSWORD": "of a test",
            "REDIS_PASSWORD": "ofatest",
            "GRAFANA_PORT": str(free_port()),
        }
        file = Path(directory) / "docker-compose.yml"
        content = without_gpu((REPOSITORY / "docker-compose.yml").read_text())
        file.write_text(content)
        images = {name: of["image"] for name, of in yaml.safe_load(content)["services"].items()}
        left_out = [name for name in OPTIONAL if not docker.has_image(images[name])]
        compose = functools.partial(
            docker.compose, "--project-name", PROJECT, "--file", str(file),
            "--project-directory", str(REPOSITORY),
        )  # fmt: skip
        began = time.perf_counter()
        with wheel(docker, Path(directory)) as address:
            compose("build", "--build-arg", f"TORCH={address}", *BUILT)
        seconds = round(time.perf_counter() - began, 1)
        url, prometheus = (f"http://127.0.0.1:{number}" for number in (port, prometheus_port))
        try:
            yield Stack(docker, compose, url, prometheus, stand_ins, left_out, seconds)
        except Exception:
            sys.stdout.write(compose("logs", "--tail", "60"))
            raise
        finally:
            compose("down", "--volumes", "--timeout", "60")


def without_gpu(content: str) -> str:
    """What docker/cpu.yml makes of it, for a Compose that does not know `!reset`."""
    file = yaml.safe_load(content)
    for service in file["services"].values():
        service.pop("deploy", None)
    return yaml.safe_dump({k: v for k, v in file.items() if not k.startswith("x-")})


@contextmanager
def wheel(docker: Engine, directory: Path) -> Iterator[str]:
    """The address, for a build, of the torch that this machine's pip would install."""
    pinned = (REPOSITORY / "deploy" / "locks" / "torch.txt").read_text().strip()
    subprocess.run(
        [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", pinned],
        cwd=directory,
        check=True,
    )
    (file,) = directory.glob("torch-*.whl")
    subnet = "{{(index .IPAM.Config 0).Subnet}}"
    bridge = docker.docker("network", "inspect", "bridge", "--format", subnet).strip()
    host = str(next(ipaddress.ip_network(bridge).hosts()))
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(directory))
    server = http.server.ThreadingHTTPServer((host, 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://{host}:{server.server_port}/{file.name}"
    finally:
        server.shutdown()


def _main_job(url: str, prometheus: str) -> Figures:
    """A budget, its model, ten images; then every process of ours answers Prometheus."""
    started = time.perf_counter()
    wait(lambda: _answers(f"{url}/readyz"), READY_SECONDS)
    ready = time.perf_counter()
    with Client(url) as client:
        model = client.wait(client.create_model(max_mem_gb=4).id)
        made = time.perf_counter()
        pixels(client.generate(model.id))
    assert _answers(f"{url}/")
    assert _answers(f"{url}/families/fashion/previews.png")
    wait(lambda: _targets(prometheus) == {"up"}, READY_SECONDS)
    return {
        "up_seconds": round(ready - started, 1),
        "ready_model_seconds": round(made - ready, 1),
        "images_seconds": round(time.perf_counter() - made, 1),
    }


def _answers(url: str) -> httpx.Response | None:
    with suppress(httpx.TransportError):
        answer = httpx.get(url, timeout=120, trust_env=False)
        return answer if answer.is_success else None
    return None


def _targets(prometheus: str) -> set[str]:
    """The health of ours, by Prometheus."""
    if (answer := _answers(f"{prometheus}/api/v1/targets")) is None:
        return set()
    active = answer.json()["data"]["activeTargets"]
    return {target["health"] for target in active if target["labels"]["job"] == "fineserve"}
