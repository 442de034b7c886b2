"""What counts as older than the code that it measures."""

import subprocess
from pathlib import Path

import pytest

from benchmarks.freshness import PATHS, stale_parts
from benchmarks.parts import REPOSITORY


def git(root: Path, *words: str) -> str:
    settings = ("-c", "user.name=a", "-c", "user.email=a@b")
    done = subprocess.run(["git", *settings, *words], cwd=root, capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    git(tmp_path, "init")
    (tmp_path / "learngenes" / "training").mkdir(parents=True)
    (tmp_path / "service").mkdir()
    commit(tmp_path, "learngenes/training/steps.py", "1")
    return tmp_path


def commit(root: Path, file: str, content: str) -> str:
    (root / file).write_text(content)
    git(root, "add", "--all")
    git(root, "commit", "--message", "more")
    return git(root, "rev-parse", "HEAD")


def measured(commit: str) -> dict[str, object]:
    return {"origin": {"commit": commit}}


def test_only_a_change_of_what_is_measured_makes_it_old(root: Path) -> None:
    first = git(root, "rev-parse", "HEAD")
    result = {"parts": {"speed": measured(first)}}
    commit(root, "service/app.py", "of no matter")
    assert stale_parts("training", result, root) == []
    changed = commit(root, "learngenes/training/steps.py", "2")
    assert stale_parts("training", result, root) == ["speed"]
    result["parts"]["again"] = measured(changed)
    assert stale_parts("training", result, root) == ["speed"]


def test_what_came_of_changes_that_nobody_has_or_of_no_commit_is_old(root: Path) -> None:
    here = git(root, "rev-parse", "HEAD")
    parts = {"a": measured(f"{here[:12]}-dirty"), "b": measured("0" * 40), "c": {}}
    assert stale_parts("training", {"parts": parts}, root) == ["a", "b", "c"]
    assert stale_parts("training", measured(here), root) == []
    several = {"origin": {"commits": ["", here]}}
    assert stale_parts("training", several, root) == ["training"]
    assert stale_parts("training-digits", {"origin": {"commits": [here]}}, root) == []


def test_every_path_of_a_benchmark_is_one() -> None:
    named = {path for paths in PATHS.values() for path in paths}
    assert [path for path in named if not (REPOSITORY / path).exists()] == []
    files = (REPOSITORY / "benchmarks" / "results").glob("*.json")
    results = {file.stem.partition("-")[0] for file in files}
    assert results <= set(PATHS)
