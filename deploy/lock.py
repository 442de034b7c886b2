"""Pin what is installed, with hashes, for each role: `python deploy/lock.py` writes deploy/locks.

Versions stay as they are where they can; `python deploy/lock.py --upgrade` takes the newest ones.
torch is pinned without a hash, and what only its builds for a GPU need not at all: every kind of
device has a build of its own.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

from install import LOCKS, PIP, ROOT, TORCH, uv_environment

ROLES = {
    "uv": (),
    "service": ("cli", "service", "tracing"),
    "worker": ("cli", "service", "worker", "tracing"),
    "server": ("server", "plot"),
    "dev": ("server", "plot", "dev", "condense", "tracing"),
}
"""Extras of each role; uv installs the others."""
OF_GPUS = re.compile(r"nvidia-(?!ml-py)|cuda-|triton")
OPTIONS = (
    "--generate-hashes",
    "--no-header",
    "--no-annotate",
    "--no-emit-package",
    "torch",
)


def main(upgrade: bool) -> None:
    listed = subprocess.run([*PIP, "config", "list"], capture_output=True, text=True, check=True)
    environment = {**os.environ, **(uv_environment(listed.stdout) or {})}
    pinned = ROOT / "var" / "pinned.txt"
    pinned.parent.mkdir(exist_ok=True)
    known = [LOCKS / "dev.txt", LOCKS / "uv.txt", TORCH]
    pinned.write_text("" if upgrade else "".join(_pins(file) for file in known if file.exists()))
    build = ROOT / "var" / "build.txt"
    for role, extras in ROLES.items():
        build.write_text("hatchling\n" if extras else "uv\n")
        sources = [str(ROOT / "pyproject.toml"), str(build)] if extras else [str(build)]
        words = [word for extra in extras for word in ("--extra", extra)]
        command = [str(Path(sys.executable).parent / "uv"), "pip", "compile", "--quiet", *sources]
        # the oldest Python that serves, as Debian's is; developers' tools want a newer one
        oldest = () if role == "dev" else ("--python-version", "3.11")
        command += [*words, *OPTIONS, *oldest, "--constraint", str(pinned)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        packages = re.split(r"^(?=[a-z0-9])", done.stdout, flags=re.MULTILINE)
        kept = "".join(package for package in packages if not OF_GPUS.match(package))
        (LOCKS / f"{role}.txt").write_text(kept)


def _pins(file: Path) -> str:
    lines = file.read_text().splitlines()
    return "".join(f"{line.split()[0]}\n" for line in lines if "==" in line)


if __name__ == "__main__":
    main("--upgrade" in sys.argv)
