"""Which results are older than the code that they measure.

A part is fresh while nothing under the paths of its benchmark has changed since the commit at
which it was measured.
"""

import subprocess
from pathlib import Path

from benchmarks.parts import REPOSITORY, Figures

SERVICE = ("fineserve", "learngenes", "registry", "service", "worker")
SIZING = ("learngenes/measuring", "learngenes/model", "learngenes/sizing", "learngenes/stepping")
TRAINING = ("learngenes/data", "learngenes/model", "learngenes/training")
SERVED = (*SERVICE, "families/fashion")
PATHS: dict[str, tuple[str, ...]] = {
    "elastic": SERVED,
    "form": TRAINING,
    "gpu": SERVICE,
    "healing": TRAINING,
    "importing": (*TRAINING, "learngenes/formats"),
    "interop": SERVED,
    "main_job": SERVED,
    "operate": (*SERVED, "docker", "deploy"),
    "paper": (*TRAINING, "benchmarks/paper"),
    "sampling": ("learngenes", "families"),
    "scale": SERVED,
    "serving": SERVED,
    "sizing": SIZING,
    "start": SERVED,
    "training": TRAINING,
    "trust": SERVED,
}
"""What each benchmark measures: folders and files of this repository. What follows a hyphen in a
result's name says on what data."""


def stale_parts(name: str, result: Figures, root: Path = REPOSITORY) -> list[str]:
    """Parts of a result that were measured of other code than there is at HEAD, in their order."""
    parts = result.get("parts") or {name: result}
    return [part for part, figures in parts.items() if _is_stale(name, figures, root)]


def _is_stale(name: str, figures: Figures, root: Path) -> bool:
    origin = figures.get("origin", {})
    commits = origin.get("commits") or [origin.get("commit")]
    return any(_changed_since(commit, PATHS[name.partition("-")[0]], root) for commit in commits)


def _changed_since(commit: str | None, paths: tuple[str, ...], root: Path) -> bool:
    if not commit:
        return True
    command = ["git", "diff", "--quiet", commit, "HEAD", "--", *paths]
    return subprocess.run(command, cwd=root, capture_output=True, check=False).returncode != 0
