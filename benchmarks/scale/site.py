"""Two hosts on one machine, which share a Redis and a bucket and nothing else.

The bucket is of a real S3 server, SeaweedFS.
"""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from benchmarks.deployment import Deployment, free_port, wait
from fineserve.embedded import valkey_command

WEED = Path(sys.executable).parent / "weed"
BUCKET = "artifacts"


@dataclass(frozen=True)
class Shared:
    """A server that all hosts use."""

    process: "subprocess.Popen[bytes]"
    url: str

    @contextlib.contextmanager
    def out_of_reach(self) -> Iterator[None]:
        """It answers nobody until the block ends."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@dataclass(frozen=True)
class Bucket(Shared):
    """A bucket that fineserve is told of as people tell other programs."""

    endpoint: str

    @property
    def environment(self) -> dict[str, str]:
        return {
            "AWS_ACCESS_KEY_ID": "anybody",
            "AWS_SECRET_ACCESS_KEY": "anything",
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ALLOW_HTTP": "true",
            "AWS_REGION": "us-east-1",
        }


@contextlib.contextmanager
def bucket(directory: Path) -> Iterator[Bucket]:
    master, volume, filer, s3 = (free_port() for _ in range(4))
    ports = {"master": master, "volume": volume, "filer": filer, "s3": s3}
    command = [str(WEED), "server", f"-dir={directory}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
    command += [f"-{name}.port={port}" for name, port in ports.items()]
    command += [f"-{name}.port.grpc={free_port()}" for name in ports]
    command += [
        "-s3",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.volumeSizeLimitMB=64",
        "-volume.max=100",
    ]
    with (
        (directory / "log").open("wb") as log,
        subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT) as process,
    ):
        bucket = Bucket(process, f"s3://{BUCKET}/fineserve", f"http://127.0.0.1:{s3}")

        def made() -> bool:
            with contextlib.suppress(httpx.HTTPError):
                return httpx.put(f"{bucket.endpoint}/{BUCKET}", trust_env=False).is_success
            return False

        try:
            wait(made, 60)
            time.sleep(1)  # until volumes are there
            yield bucket
        finally:
            process.send_signal(signal.SIGCONT)
            process.kill()


@contextlib.contextmanager
def broker(directory: Path) -> Iterator[Shared]:
    """A Valkey that is no host's own."""
    directory.mkdir(parents=True, exist_ok=True)
    socket = directory / "valkey.sock"
    with subprocess.Popen(valkey_command(socket, directory), stdout=subprocess.DEVNULL) as process:
        try:
            wait(socket.exists, 30)
            yield Shared(process, f"unix://{socket}")
        finally:
            process.send_signal(signal.SIGCONT)
            process.terminate()


class Host(Deployment):
    """Workers and an API with a disk of their own."""

    def __init__(
        self,
        families: Path,
        redis: Shared,
        bucket: Bucket | None,
        core: int | None = None,
        **more: Any,
    ) -> None:
        """`core`: the one that it may compute on; any where there is none. Without a bucket the
        artifacts are on its disk."""
        store = {} if bucket is None else {"store_url": bucket.url}
        super().__init__(families, redis_url=redis.url, **store, **more)
        self._core = core
        self.environment |= {"OMP_NUM_THREADS": "1"}
        if bucket is not None:
            self.environment |= bucket.environment

    def up(self) -> None:
        usual = os.sched_getaffinity(0)
        if self._core is not None:
            os.sched_setaffinity(0, {self._core})  # what it starts inherits it
        try:
            super().up()
        finally:
            os.sched_setaffinity(0, usual)


@dataclass(frozen=True)
class Site:
    redis: Shared
    bucket: Bucket


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """What hosts share."""
    with (
        tempfile.TemporaryDirectory(prefix="fineserve-site-", ignore_cleanup_errors=True) as folder,
        broker(Path(folder) / "valkey") as redis,
        bucket(Path(folder)) as artifacts,
    ):
        yield Site(redis, artifacts)
