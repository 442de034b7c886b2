"""The artifact store on objects: in memory, and of an S3 that cannot be reached."""

import threading
from pathlib import Path

import httpx
import obstore
import pytest
from obstore.store import MemoryStore

from benchmarks.scale.site import bucket as site_bucket
from registry.datasets import Datasets
from registry.errors import ArtifactError, StoreAway, StoreRefuses
from registry.settings import Settings
from registry.store import objects, open_store
from registry.store.cache import Cache
from registry.store.objects import ObjectStore

CACHE_BYTES = 1000


@pytest.fixture
def bucket() -> MemoryStore:
    return MemoryStore()


@pytest.fixture
def store(bucket: MemoryStore, tmp_path: Path) -> ObjectStore:
    return ObjectStore(bucket, tmp_path / "here", CACHE_BYTES)


@pytest.fixture
def elsewhere(bucket: MemoryStore, tmp_path: Path) -> ObjectStore:
    """The same store as another host has it."""
    return ObjectStore(bucket, tmp_path / "there", CACHE_BYTES)


def paths(bucket: MemoryStore, prefix: str = "") -> list[str]:
    found = [each["path"] for chunk in obstore.list(bucket) for each in chunk]
    return sorted(path for path in found if path.startswith(prefix))


def test_what_one_host_stores_another_reads(store: ObjectStore, elsewhere: ObjectStore) -> None:
    store.put("models/m-1/revision-0", {"a": b"abc", "b": b"", "c": b"defg"}, {"revision": 0})
    assert elsewhere.read_all("models/m-1/revision-0", ["c", "b", "a"]) == [b"defg", b"", b"abc"]
    assert elsewhere.describe("models/m-1/revision-0")["revision"] == 0
    assert elsewhere.has("models/m-1/revision-0", "b")
    assert not elsewhere.has("models/m-1/revision-0", "d")
    assert not elsewhere.has("models/m-2/revision-0", "a")
    assert elsewhere.ids("models") == ["m-1"]
    assert elsewhere.idle_seconds("models/m-1") < 60


def test_an_artifact_is_immutable(store: ObjectStore) -> None:
    store.put("x/y", {"a": b"first"}, {})
    store.put("x/y", {"a": b"second"}, {})
    assert store.read("x/y", "a") == b"first"


def test_of_many_attempts_at_once_one_is_whole(
    store: ObjectStore, bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = threading.Barrier(8)

    def unseen(_: object, __: str) -> bool:
        together.wait()
        return False

    monkeypatch.setattr(ObjectStore, "has", unseen)

    def attempt(number: int) -> None:
        store.put("x/y", {"a": b"a%d" % number, "b": b"b%d" % number}, {"by": number})

    threads = [threading.Thread(target=attempt, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    by = store.describe("x/y")["by"]
    assert store.read_all("x/y", ["a", "b"]) == [b"a%d" % by, b"b%d" % by]
    assert len(paths(bucket)) == 2, "what the others wrote is gone"


def test_what_is_missing_or_corrupt_is_named(store: ObjectStore, bucket: MemoryStore) -> None:
    store.put("x/y", {"a": b"abc"}, {})
    with pytest.raises(ArtifactError, match="x/y/b cannot be read"):
        store.read("x/y", "b")
    with pytest.raises(ArtifactError, match="x/z cannot be read"):
        store.read("x/z", "a")
    (data,) = paths(bucket, "x/y/data-")
    obstore.put(bucket, data, b"abd")
    with pytest.raises(ArtifactError, match="x/y/a is corrupt"):
        store.read("x/y", "a")
    assert store.checked_path("x/y", "a") is None
    assert paths(bucket) == [], "what is corrupt is of no use to anybody"
    obstore.put(bucket, "x/foreign/manifest.json", b'{"sha256": {"a": "00"}}')
    with pytest.raises(ArtifactError, match="x/foreign/a cannot be read"):
        store.read("x/foreign", "a")
    store.put("x/gone", {"a": b"abc"}, {})
    obstore.delete(bucket, paths(bucket, "x/gone/data-"))
    with pytest.raises(ArtifactError, match="x/gone/a cannot be read"):
        store.read("x/gone", "a")


def test_a_file_to_stream_lies_on_this_host(store: ObjectStore) -> None:
    assert store.checked_path("exports/m/r", "model.tar") is None
    large = bytes(2 * CACHE_BYTES)
    store.put("exports/m/r", {"model.tar": large}, {})
    path = store.checked_path("exports/m/r", "model.tar")
    assert path is not None
    assert path.read_bytes() == large


def test_what_is_being_put_is_not_deleted_by_who_waits_for_it(
    store: ObjectStore, elsewhere: ObjectStore, bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = obstore.put

    def looked_for(bucket: MemoryStore, path: str, content: bytes, **how: object) -> None:
        if path == "exports/m/r/manifest.json":
            assert elsewhere.checked_path("exports/m/r", "model.tar") is None
        if path == "latents/t/e/manifest.json":
            assert Datasets(elsewhere).latents("t", "e") is None
        put(bucket, path, content, **how)

    monkeypatch.setattr(objects.obstore, "put", looked_for)
    store.put("exports/m/r", {"model.tar": b"abc"}, {})
    store.put("latents/t/e", {"latents.safetensors": b"abc"}, {})
    assert elsewhere.read("exports/m/r", "model.tar") == b"abc"
    assert elsewhere.read("latents/t/e", "latents.safetensors") == b"abc"


def test_a_description_alone_can_be_replaced(store: ObjectStore, elsewhere: ObjectStore) -> None:
    store.put("models/m-1/record", {}, {"record": "first"})
    for content in ("second", "third"):
        store.replace_description("models/m-1/record", {"record": content})
        assert elsewhere.describe("models/m-1/record")["record"] == content


def test_only_what_is_below_a_name_is_deleted(store: ObjectStore, bucket: MemoryStore) -> None:
    for name in ("models/m-1/record", "models/m-1/revision-0", "models/m-10/record"):
        store.put(name, {}, {})
    store.delete("models/m-1")
    assert paths(bucket) == ["models/m-10/record/manifest.json"]
    store.delete("models/m-1")


def test_what_is_old_or_unfinished_is_swept(
    store: ObjectStore, bucket: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("generations/g-1", "exports/m-1/r-1", "latents/t-1/e", "models/m-1/revision-0")
    for name in names:
        store.put(name, {"a": b"1"}, {})
    obstore.put(bucket, "models/m-2/revision-0/data-0123456789ab", b"1")
    obstore.put(bucket, "models/m-1/revision-0/data-ba9876543210", b"1")
    foreign = ["models/somebody/weights.bin", "photos/1.jpg"]
    for path in foreign:
        obstore.put(bucket, path, b"1")
    store.checkpoint("models/m-3/checkpoint-1-x").write_bytes(b"1")
    store.keep_checkpoint("models/m-3/checkpoint-1-x")
    assert store.used_bytes()["latents"] > 1
    assert store.sweep(3600) == 0
    monkeypatch.setattr(objects, "READ_SECONDS", -1)
    monkeypatch.setattr(objects, "UNFINISHED_SECONDS", -1)
    assert store.sweep(-1) == 5
    left = ["models/m-1/revision-0", "models/m-3", "models/somebody", "photos"]
    assert set(foreign) <= set(paths(bucket))
    assert "photos" not in store.used_bytes()
    assert sorted({path.rpartition("/")[0] for path in paths(bucket)}) == left
    assert store.read("models/m-1/revision-0", "a") == b"1"


def test_another_host_goes_on_from_a_checkpoint(
    store: ObjectStore, elsewhere: ObjectStore, bucket: MemoryStore
) -> None:
    name = "models/m-1/checkpoint-1-L2"
    path = store.checkpoint(name)
    assert not path.exists()
    store.keep_checkpoint(name)  # nothing was written yet
    path.write_bytes(b"step 10")
    store.keep_checkpoint(name)
    assert elsewhere.checkpoint(name).read_bytes() == b"step 10"
    store.put("models/m-1/record", {}, {})
    elsewhere.drop_checkpoints("models/m-1")
    assert paths(bucket) == ["models/m-1/record/manifest.json"]
    assert not store.checkpoint(name).exists(), "a stale one of this host is not gone on from"


def test_folders_to_work_in_are_on_this_host(store: ObjectStore, tmp_path: Path) -> None:
    with store.scratch() as folder:
        assert folder.is_relative_to(tmp_path / "here")
    assert not folder.exists()
    assert store.free_bytes() > 0


def test_small_files_are_not_all_looked_at_for_each_that_comes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks: list[Path] = []
    make_room = Cache._make_room
    monkeypatch.setattr(
        Cache, "_make_room", lambda *which: (looks.append(which[1]), make_room(*which))
    )
    cache = Cache(tmp_path, 1000)
    for name in range(2000):
        cache.get(f"{name}", lambda: b"1")
    assert 850 < len([*tmp_path.iterdir()]) <= 1000
    assert len(looks) < 40


def test_what_was_read_longest_ago_makes_room(tmp_path: Path) -> None:
    cache = Cache(tmp_path, 10)
    for name in ("a", "b"):
        assert cache.get(name, lambda: b"12345") == b"12345"
    cache.get("a", lambda: pytest.fail("it is there"))
    cache.get("c", lambda: b"123")
    assert [cache.path(name) is not None for name in "abc"] == [True, False, True]
    cache.get("d", lambda: bytes(100))
    assert [cache.path(name) is not None for name in "acd"] == [False, False, True]


def test_a_bucket_that_cannot_be_reached_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_ENDPOINT_URL": "http://127.0.0.1:9",
        "AWS_ALLOW_HTTP": "true",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(objects, "RETRY", {"max_retries": 0})
    store = open_store(Settings(store_url="s3://bucket/folder", var_dir=tmp_path))
    for work in (
        lambda: store.put("x/y", {"a": b"1"}, {}),
        lambda: store.read("x/y", "a"),
        lambda: store.ids("x"),
        lambda: store.sweep(0),
    ):
        with pytest.raises(StoreAway, match="cannot be reached"):
            work()


def test_it_can_be_tried_out(store: ObjectStore, bucket: MemoryStore) -> None:
    store.try_out()
    assert paths(bucket) == []


def test_what_is_no_bucket_is_refused(tmp_path: Path) -> None:
    for url in ("ftp://host/folder", "bucket"):
        with pytest.raises(StoreRefuses, match="no bucket can be opened as"):
            ObjectStore.of(url, tmp_path, CACHE_BYTES)


def test_the_one_file_of_an_artifact_has_an_address(store: ObjectStore, tmp_path: Path) -> None:
    store.put("exports/m-1/one", {"model.tar": b"abc"}, {})
    assert store.link("exports/m-1/one", "model.tar") is None, "memory has no addresses"
    with site_bucket(tmp_path) as bucket, pytest.MonkeyPatch.context() as patch:
        for name, value in bucket.environment.items():
            patch.setenv(name, value)
        store = ObjectStore.of(bucket.url, tmp_path / "here", CACHE_BYTES)
        store.put("exports/m-1/one", {"model.tar": b"abc"}, {})
        store.put("models/m-1/two", {"a": b"abc", "b": b"d"}, {})
        link = store.link("exports/m-1/one", "model.tar")
        assert link is not None
        assert httpx.get(link, trust_env=False).content == b"abc"
        assert store.link("models/m-1/two", "a") is None
        assert store.link("exports/m-1/three", "model.tar") is None
