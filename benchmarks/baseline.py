"""An older commit of this repository, to be measured beside the present one in the same run."""

import os
import subprocess
from pathlib import Path

from benchmarks.parts import REPOSITORY

COMMIT = "7f885ee"
"""Before factors were trained and served in the present form."""


def checkout(commit: str = COMMIT) -> Path:
    """Work tree of `commit` under var/."""
    directory = REPOSITORY / "var" / "baseline" / commit
    if not directory.exists():
        words = ["git", "worktree", "add", "--detach", str(directory), commit]
        subprocess.run(words, cwd=REPOSITORY, check=True, capture_output=True)
    return directory


def environment(repository: Path) -> dict[str, str]:
    """Environment in which Python imports the packages of `repository`."""
    return {**os.environ, "PYTHONPATH": str(repository)}
