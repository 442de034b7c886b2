"""A real S3 server on a free port: SeaweedFS."""

import contextlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from benchmarks.deployment import free_port, wait

WEED = Path(sys.executable).parent / "weed"
BUCKET = "artifacts"


@dataclass(frozen=True)
class Bucket:
    """A bucket that fineserve is told of as people tell other programs."""

    endpoint: str
    process: "subprocess.Popen[bytes]"

    @property
    def url(self) -> str:
        return f"s3://{BUCKET}/fineserve"

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
    def out_of_reach(self) -> Iterator[None]:
        """It answers nobody until the block ends."""
        self.process.send_signal(signal.SIGSTOP)
        try:
            yield
        finally:
            self.process.send_signal(signal.SIGCONT)


@contextlib.contextmanager
def running(directory: Path) -> Iterator[Bucket]:
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
        bucket = Bucket(f"http://127.0.0.1:{s3}", process)

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
