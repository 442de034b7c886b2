"""`fineserve doctor`: checks of this host, with advice where it cannot serve."""

import importlib.util
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import httpx
import redis

from registry.repository import connect
from registry.settings import Settings

NEEDED_TORCH = (2, 13)
"""Version of torch that all of this was tested with: compiled kernels are saved and loaded by
functions that earlier ones do not have."""
CUDA_13_DRIVER = 580
"""First driver for wheels that are built for CUDA 13, as PyPI's torch is from 2.11 on."""
CUDA_12_DRIVER = 525
"""First driver for wheels that are built for CUDA 12."""
LEAST_DISK_BYTES, SPARSE_DISK_BYTES = 10**9, 5 * 10**9
LEAST_MEMORY_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Finding:
    check: str
    verdict: Literal["ok", "warning", "broken"]
    what: str
    advice: str = ""


def examine(settings: Settings) -> Iterator[Finding]:
    """Finding of each check, as soon as it is made; an unknown failure counts as broken."""
    for name, check in CHECKS.items():
        try:
            yield check(settings)
        except Exception as error:
            yield Finding(name, "broken", f"{type(error).__name__}: {error}", "tell its authors")


def torch(_: Settings) -> Finding:
    if importlib.util.find_spec("torch") is None:
        return Finding("torch", "broken", "not installed", "pip install 'fineserve[worker]'")
    import torch

    version = torch.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < NEEDED_TORCH:
        needed = ".".join(map(str, NEEDED_TORCH))
        return Finding("torch", "broken", version, f"pip install 'torch>={needed}'")
    return Finding("torch", "ok", version)


def gpu(settings: Settings) -> Finding:
    driver = _nvidia_smi()
    if importlib.util.find_spec("torch") is None:
        return Finding("gpu", "warning", driver or "no driver", "install torch to use it")
    import torch

    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        return Finding("gpu", "ok", f"{', '.join(names)}; driver {driver}")
    if driver and torch.version.cuda is None:
        return Finding(
            "gpu", "broken", f"driver {driver}, but torch {torch.__version__} is built for CPUs",
            "install a torch that is built for CUDA",
        )  # fmt: skip
    if driver:
        return Finding(
            "gpu", "broken", f"driver {driver} is too old for CUDA {torch.version.cuda}",
            _wheel_for(driver),
        )  # fmt: skip
    if settings.device == "cuda":
        return Finding(
            "gpu", "broken", "none, and FINESERVE_DEVICE is cuda",
            "install a driver, or set FINESERVE_DEVICE to auto",
        )  # fmt: skip
    return Finding("gpu", "ok", "none; models run on the CPU")


def _wheel_for(driver: str) -> str:
    """What to install beside a driver that torch cannot use."""
    major = int(driver.partition(".")[0])
    newer = f"update the driver to {CUDA_13_DRIVER} or newer"
    if major < CUDA_12_DRIVER:
        return newer
    return f"{newer}, or install torch from PyTorch's index cu126 or cu129, which it fits"


def _nvidia_smi() -> str:
    """Version of the driver; empty without one."""
    command = shutil.which("nvidia-smi")
    if command is None:
        return ""
    query = [command, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(query, capture_output=True, text=True, check=False)  # noqa: S603
    return done.stdout.split("\n")[0].strip() if done.returncode == 0 else ""


def compiler(settings: Settings) -> Finding:
    if not settings.compile:
        return Finding("compiler", "ok", "not needed: FINESERVE_COMPILE=false")
    found = next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    if found is None:
        return Finding(
            "compiler", "warning", "none: sampling is slower", "apt-get install g++"
        )  # fmt: skip
    return Finding("compiler", "ok", found)


def memory(_: Settings) -> Finding:
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free_bytes = int(fields["MemAvailable"].split()[0]) * 1024
    told = f"{free_bytes / 1e9:.1f} GB available"
    if free_bytes < LEAST_MEMORY_BYTES:
        return Finding("memory", "warning", told, "end something, or lower FINESERVE_DEVICE_MEM_GB")
    return Finding("memory", "ok", told)


def disk(settings: Settings) -> Finding:
    store = settings.resolved_store_dir.resolve()
    existing = next(path for path in (store, *store.parents) if path.exists())
    free_bytes = shutil.disk_usage(existing).free
    told = f"{free_bytes / 1e9:.1f} GB free for {store}"
    advice = "free some, or set FINESERVE_STORE_DIR to a larger disk"
    if free_bytes < LEAST_DISK_BYTES:
        return Finding("disk", "broken", told, advice)
    if free_bytes < SPARSE_DISK_BYTES:
        return Finding("disk", "warning", told, advice)
    return Finding("disk", "ok", told)


def bucket(settings: Settings) -> Finding:
    if settings.store_url is None:
        return Finding("bucket", "ok", "not used: artifacts are on a disk")
    from registry.errors import RegistryError
    from registry.store.objects import ObjectStore

    try:
        with tempfile.TemporaryDirectory() as local:
            ObjectStore.of(settings.store_url, Path(local), 0, {"max_retries": 1}).try_out()
    except RegistryError as error:
        return Finding(
            "bucket", "broken", f"{settings.store_url}: {str(error).splitlines()[0]}",
            "check FINESERVE_STORE_URL, AWS_ENDPOINT_URL and the credentials in the environment",
        )  # fmt: skip
    return Finding("bucket", "ok", f"{settings.store_url} can be written to and read")


def port(settings: Settings) -> Finding:
    url = f"http://{settings.host}:{settings.port}"
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((settings.host, settings.port))
        except OSError as error:
            if _is_fineserve(url):
                return Finding("port", "ok", f"fineserve answers at {url}")
            return Finding(
                "port", "broken", f"{url}: {error.strerror}",
                f"FINESERVE_PORT={settings.port + 1} fineserve up, or end what has it",
            )  # fmt: skip
    return Finding("port", "ok", f"{url} is free")


def _is_fineserve(url: str) -> bool:
    try:
        return bool(httpx.get(f"{url}/healthz", timeout=2).json() == {"status": "ok"})
    except (httpx.HTTPError, ValueError):
        return False


def broker(settings: Settings) -> Finding:
    if settings.redis_url is None and not settings.valkey_socket.exists():
        return Finding("broker", "ok", "the embedded one, not running; `fineserve up` starts it")
    client = connect(settings.resolved_redis_url)
    try:
        client.ping()
        if client.info("cluster").get("cluster_enabled"):
            return Finding(
                "broker", "broken", f"{settings.redis_address} is a Redis Cluster",
                "take a Redis of one server, or with replicas: scripts here touch several keys",
            )  # fmt: skip
        told = client.config_get("appendonly", "maxmemory-policy")
    except redis.ResponseError:  # as of a provider who has set it
        return Finding(
            "broker", "warning", f"{settings.redis_address} does not tell how it is configured",
            "see that it has appendonly yes and maxmemory-policy noeviction",
        )  # fmt: skip
    except redis.RedisError as error:
        return Finding(
            "broker", "broken", f"{settings.redis_address}: {error}",
            "start it, or correct FINESERVE_REDIS_URL",
        )  # fmt: skip
    wrong = [
        f"{name} {wanted}"
        for name, wanted in (("appendonly", "yes"), ("maxmemory-policy", "noeviction"))
        if told.get(name, wanted) != wanted
    ]
    if wrong:
        return Finding(
            "broker", "broken", "it would lose accepted work", f"set {' and '.join(wrong)} in it"
        )
    return Finding("broker", "ok", str(settings.redis_address))


def families(settings: Settings) -> Finding:
    found = sorted(settings.families_dir.glob("*/family.json"))
    if not found:
        return Finding(
            "families", "broken", f"none in {settings.families_dir.resolve()}",
            "set FINESERVE_FAMILIES_DIR",
        )  # fmt: skip
    if importlib.util.find_spec("torch") is None:
        return Finding("families", "warning", "not checked without torch")
    from learngenes.family.family import FamilyError, load_family

    try:
        names = [load_family(path.parent).manifest.name for path in found]
    except FamilyError as error:
        return Finding("families", "broken", str(error), "copy it again from where it is whole")
    return Finding("families", "ok", ", ".join(names))


CHECKS: dict[str, Callable[[Settings], Finding]] = {
    "torch": torch,
    "gpu": gpu,
    "compiler": compiler,
    "memory": memory,
    "disk": disk,
    "bucket": bucket,
    "port": port,
    "broker": broker,
    "families": families,
}
