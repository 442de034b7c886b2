import json
import os
import time
from pathlib import Path

import pytest

from registry.errors import ArtifactError
from registry.store import ArtifactStore


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_an_artifact_comes_back_with_its_manifest(store: ArtifactStore, tmp_path: Path) -> None:
    store.put("models/m-1/revision-0", {"a.bin": b"abc"}, {"revision": 0})
    assert store.read("models/m-1/revision-0", "a.bin") == b"abc"
    manifest = json.loads((tmp_path / "models/m-1/revision-0/manifest.json").read_text())
    assert manifest["revision"] == 0
    assert len(manifest["sha256"]["a.bin"]) == 64
    assert list((tmp_path / "incoming").iterdir()) == []


def test_an_artifact_is_immutable(store: ArtifactStore) -> None:
    store.put("x/y", {"a": b"first"}, {})
    store.put("x/y", {"a": b"second"}, {})
    assert store.read("x/y", "a") == b"first"


def test_corruption_is_noticed(store: ArtifactStore, tmp_path: Path) -> None:
    store.put("x/y", {"a": b"abc"}, {})
    (tmp_path / "x/y/a").write_bytes(b"abd")
    with pytest.raises(ArtifactError, match="x/y/a is corrupt"):
        store.read("x/y", "a")


@pytest.mark.parametrize("file", ["missing", "a"])
def test_a_missing_artifact_is_named(store: ArtifactStore, tmp_path: Path, file: str) -> None:
    store.put("x/y", {"a": b"abc"}, {})
    if file == "a":
        store.delete("x/y")
    with pytest.raises(ArtifactError, match=f"x/y/{file} cannot be read"):
        store.read("x/y", file)


def test_old_and_unfinished_artifacts_are_swept(store: ArtifactStore, tmp_path: Path) -> None:
    store.put("generations/old", {"a": b"1"}, {})
    store.put("generations/new", {"a": b"1"}, {})
    (tmp_path / "incoming/half").mkdir()
    long_ago = time.time() - 1000
    for path in ("generations/old", "incoming/half"):
        os.utime(tmp_path / path, (long_ago, long_ago))
    assert store.sweep(500) == 2
    assert store.read("generations/new", "a") == b"1"
    assert not (tmp_path / "generations/old").exists()
    assert store.sweep(500) == 0
