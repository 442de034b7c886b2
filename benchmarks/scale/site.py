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


APART = "unshare", "--pid", "--uts", "--fork", "--mount-proc", "--kill-child"
KEEP_HOST = """
import signal, socket, sys
socket.sethostname(sys.argv[1])
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
signal.pause()
"""
"""What runs as process 1 of a host, for as long as there is one."""


class Host(Deployment):
    """Workers and an API with a disk, a hostname and processes of their own.

    That a process of another host has ended nobody sees: its leases have to run out.
    """

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
        self._machine: subprocess.Popen[bytes] | None = None
        self.name = self.var.name.replace("_", "-")
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

    def lose(self) -> None:
        """End every process of it at once, as a loss of power would."""
        if self._machine is not None:
            self._machine.kill()  # and with it process 1, and so all others
            self._machine.wait()
            self._machine = None
            wait(lambda: not self.pids())

    def __exit__(self, *of: object) -> None:
        self.lose()
        super().__exit__(*of)

    def workers(self) -> set[str]:
        """Names that its processes would have as workers."""
        return {f"{self.name}:{_own_pid(pid)}" for pid in self.pids()}

    def _run(self, *command: str) -> "subprocess.CompletedProcess[str]":
        if self._machine is None:
            keep = [sys.executable, "-c", KEEP_HOST, self.name]
            self._machine = subprocess.Popen([*APART, *keep])
            look = "cat", "/proc/sys/kernel/hostname"
            wait(lambda: self._enter(*look).stdout.strip() == self.name, 10)
        return self._enter(*command)

    def _enter(self, *command: str) -> "subprocess.CompletedProcess[str]":
        """Run a command among the processes of the host."""
        assert self._machine is not None
        of = f"/proc/{self._machine.pid}/ns"
        spaces = [f"--pid={of}/pid_for_children", f"--uts={of}/uts", f"--mount={of}/mnt"]
        return super()._run("nsenter", *spaces, f"--wdns={self.root}", *command)


def hosts_can_be() -> bool:
    """Whether this process may start hosts: root may, in a container that lets it."""
    return subprocess.run([*APART, "true"], capture_output=True, check=False).returncode == 0


def _own_pid(pid: int) -> int:
    """Id that a process has on its own host; 0 once it has ended."""
    with contextlib.suppress(OSError):
        status = Path(f"/proc/{pid}/status").read_text()
        return int(status.partition("NSpid:")[2].partition("\n")[0].split()[-1])
    return 0


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
