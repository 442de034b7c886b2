import json
import os
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from registry.errors import ArtifactError, StorageFull
from registry.store import DirectoryStore


@pytest.fixture
def store(tmp_path: Path) -> DirectoryStore:
    return DirectoryStore(tmp_path)


def test_an_artifact_comes_back_with_its_manifest(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("models/m-1/revision-0", {"a.bin": b"abc"}, {"revision": 0})
    assert store.read("models/m-1/revision-0", "a.bin") == b"abc"
    manifest = json.loads((tmp_path / "models/m-1/revision-0/manifest.json").read_text())
    assert manifest["revision"] == 0
    assert len(manifest["sha256"]["a.bin"]) == 64
    assert list((tmp_path / "incoming").iterdir()) == []


def test_an_artifact_is_immutable(store: DirectoryStore) -> None:
    store.put("x/y", {"a": b"first"}, {})
    store.put("x/y", {"a": b"second"}, {})
    assert store.read("x/y", "a") == b"first"


@pytest.mark.parametrize(
    ("file", "break_it", "message"),
    [
        ("a", lambda store: (store.root / "x/y/a").write_bytes(b"abd"), "x/y/a is corrupt"),
        ("a", lambda store: store.delete("x/y"), "x/y/a cannot be read"),
        ("missing", lambda _: None, "x/y/missing cannot be read"),
    ],
)
def test_what_is_corrupt_or_missing_is_named(
    store: DirectoryStore, file: str, break_it: Callable[[DirectoryStore], object], message: str
) -> None:
    store.put("x/y", {"a": b"abc"}, {})
    break_it(store)
    with pytest.raises(ArtifactError, match=message):
        store.read("x/y", file)


def test_old_and_unfinished_artifacts_are_swept(store: DirectoryStore, tmp_path: Path) -> None:
    store.put("generations/old", {"a": b"1"}, {})
    store.put("generations/new", {"a": b"1"}, {})
    (tmp_path / "incoming/half").mkdir()
    long_ago = time.time() - 1000
    for path in ("generations/old", "incoming/half"):
        os.utime(tmp_path / path, (long_ago, long_ago))
    assert store.sweep(500) == 1
    assert store.read("generations/new", "a") == b"1"
    assert not (tmp_path / "generations/old").exists()
    assert (tmp_path / "incoming/half").exists()
    os.utime(tmp_path / "incoming/half", (long_ago - 3600, long_ago - 3600))
    assert store.sweep(500) == 1
    assert store.sweep(500) == 0


def test_what_is_being_written_or_read_is_never_swept(
    store: DirectoryStore, tmp_path: Path
) -> None:
    for name in ("exports/m-1/revision-1-native", "generations/g-1"):
        store.put(name, {"a": b"1"}, {})
    begun = tmp_path / "incoming" / "begun"
    begun.mkdir()
    (begun / "large").write_bytes(b"as far as it is")
    yesterday = time.time() - 24 * 3600
    for path in (begun, tmp_path / "exports/m-1"):
        os.utime(path, (yesterday, yesterday))
    assert store.sweep(0) == 0
    assert (begun / "large").exists()
    assert store.read("exports/m-1/revision-1-native", "a") == b"1"


def test_what_is_a_description_alone_can_be_replaced(store: DirectoryStore) -> None:
    store.put("models/m-1/record", {}, {"record": "first"})
    for content in ("second", "third"):
        store.replace_description("models/m-1/record", {"record": content})
        assert store.describe("models/m-1/record")["record"] == content


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Root of a disk of 256 kB."""
    directory = tmp_path / "small"
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(directory)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("only root can mount a small disk")
    yield directory
    subprocess.run(["umount", directory], check=True)


def test_a_full_disk_is_told_and_left_as_it_was(small_disk: Path) -> None:
    store = DirectoryStore(small_disk)
    store.put("x/small", {"a": b"abc"}, {})
    with pytest.raises(StorageFull, match="no room for x/large"):
        store.put("x/large", {"a": b"abc", "b": bytes(10**6)}, {})
    assert not store.has("x/large", "a")
    assert list((small_disk / "incoming").iterdir()) == []
    assert 0 < store.free_bytes() < 256_000
    store.put("x/another", {"a": bytes(1000)}, {})
    assert store.read("x/small", "a") == b"abc"


def test_what_is_not_whole_is_put_again(store: DirectoryStore) -> None:
    store.put("x/y", {"a": b"first"}, {})
    (store.root / "x/y/manifest.json").unlink()
    store.put("x/y", {"a": b"second"}, {})
    assert store.read("x/y", "a") == b"second"


def test_what_is_corrupt_is_deleted_when_it_is_to_be_streamed(store: DirectoryStore) -> None:
    store.put("x/y", {"a": b"first"}, {})
    assert store.checked_path("x/y", "a") == store.root / "x/y/a"
    (store.root / "x/y/a").write_bytes(b"firsT")
    assert store.checked_path("x/y", "a") is None
    assert not (store.root / "x/y").exists()
    assert store.checked_path("x/y", "a") is None


def test_a_folder_to_work_in_is_gone_afterwards(store: DirectoryStore) -> None:
    with store.scratch() as folder:
        (folder / "a").write_bytes(b"a")
        assert folder.parent.parent == store.root
    assert not folder.exists()
