"""A Docker engine where none runs, and stand-ins for images that cannot be pulled.

On a machine with an engine and a registry this uses them. Elsewhere (as root, on Debian) it starts
an engine of its own in a temporary directory, and makes the images from Debian's packages.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

BASE = "python:3.11-slim-bookworm"
STAND_INS = {
    "redis:7.4.2-bookworm": """
        RUN apt-get update && apt-get install -y --no-install-recommends redis-server
        RUN install -d -o redis -g redis /data
        VOLUME /data
        WORKDIR /data
    """,
    "prom/prometheus:v3.2.1": """
        RUN apt-get update && apt-get install -y --no-install-recommends prometheus
        RUN install -d -o nobody -g nogroup /prometheus
        VOLUME /prometheus
        USER nobody
        ENTRYPOINT ["/usr/bin/prometheus"]
    """,
}
"""What is built upon the base where an image cannot be pulled."""
CERTIFICATES = Path("/usr/local/share/ca-certificates")


class DockerError(RuntimeError):
    """A command failed; the message has what it said."""


class Engine:
    def __init__(self, environment: dict[str, str]) -> None:
        self.environment = environment

    def docker(self, *words: str, stdin: bytes | None = None) -> str:
        """What the command printed. Raises DockerError."""
        return self._run(["docker", *words], stdin)

    def compose(self, *words: str) -> str:
        """Compose 2, or what Debian has: 1.29."""
        try:
            self.docker("compose", "version")
        except DockerError:
            return self._run(["docker-compose", *words])
        return self.docker("compose", *words)

    def answers(self) -> bool:
        with contextlib.suppress(DockerError):
            self.docker("info")
            return True
        return False

    def has_image(self, name: str) -> bool:
        """Whether it is here, or can be pulled."""
        for verb in (("image", "inspect"), ("pull", "--quiet")):
            with contextlib.suppress(DockerError):
                self.docker(*verb, name)
                return True
        return False

    def image_bytes(self, name: str) -> int:
        return int(self.docker("image", "inspect", "--format", "{{.Size}}", name))

    def _run(self, command: list[str], stdin: bytes | None = None) -> str:
        done = subprocess.run(
            command, input=stdin, env=self.environment, capture_output=True, check=False
        )
        if done.returncode:
            raise DockerError(f"{' '.join(command)}: {done.stderr.decode()[-4000:]}")
        return done.stdout.decode()


@contextlib.contextmanager
def engine() -> Iterator[Engine]:
    """The one that runs here, or one for the time of the block."""
    debian_first = f"/usr/bin:{os.environ['PATH']}"  # its client and its engine are of one version
    buildkit = {"DOCKER_BUILDKIT": "1", "COMPOSE_DOCKER_CLI_BUILD": "1"}
    running = Engine({**os.environ, **buildkit, "PATH": debian_first})
    if running.answers():
        yield running
        return
    with tempfile.TemporaryDirectory(prefix="docker-", ignore_cleanup_errors=True) as directory:
        socket = f"unix://{directory}/docker.sock"
        started = Engine({**running.environment, "DOCKER_HOST": socket})
        with (Path(directory) / "dockerd.log").open("w") as log:
            daemon = subprocess.Popen(
                ["dockerd", "--data-root", f"{directory}/data", "--exec-root", f"{directory}/exec",
                 "--pidfile", f"{directory}/pid", "--host", socket],
                stdout=log,
                stderr=log,
            )  # fmt: skip
            try:
                _await(started)
                yield started
            finally:
                daemon.terminate()
                daemon.wait(60)


def stand_in(engine: Engine, directory: Path) -> list[str]:
    """Make what cannot be pulled; gives the names."""
    made = []
    if not engine.has_image(BASE):
        _debian(engine, directory / "rootfs")
        made.append(BASE)
    for name, lines in STAND_INS.items():
        if not engine.has_image(name):
            file = f"FROM {BASE}\n" + "\n".join(line.strip() for line in lines.splitlines())
            engine.docker("build", "--tag", name, "-", stdin=file.encode())
            made.append(name)
    return made


def _debian(engine: Engine, rootfs: Path) -> None:
    """Debian bookworm with its Python 3.11, which trusts whom this machine trusts."""
    packages = "python3,python3-pip,python3-venv,ca-certificates"
    subprocess.run(
        ["debootstrap", "--variant=minbase", f"--include={packages}", "bookworm", str(rootfs)],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    inside = rootfs / CERTIFICATES.relative_to("/")
    shutil.copytree(CERTIFICATES, inside, dirs_exist_ok=True)
    subprocess.run(["chroot", str(rootfs), "update-ca-certificates"], check=True)
    packed = subprocess.run(["tar", "-C", str(rootfs), "-c", "."], check=True, capture_output=True)
    engine.docker("import", "-", BASE, stdin=packed.stdout)
    shutil.rmtree(rootfs)


def _await(engine: Engine, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not engine.answers():
        if time.monotonic() > deadline:
            raise TimeoutError("dockerd did not start; run it by hand to see why")
        time.sleep(0.5)
