"""Artifacts as objects of a bucket, which hosts share that share no disk.

All files of an artifact are one object, `NAME/data-ATTEMPT`, written first; `NAME/manifest.json`,
which says where in it each begins, is created last and only where there is none. So an artifact is
visible when it is whole, the first of two attempts wins, and their files never mix.
"""

import contextlib
import datetime
import json
import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import obstore
from obstore.exceptions import (
    AlreadyExistsError,
    BaseError,
    PermissionDeniedError,
    UnauthenticatedError,
)

from learngenes.files import write_file
from registry.errors import ArtifactError, StoreAway, StoreRefuses
from registry.store.artifacts import (
    KINDS,
    LINK_SECONDS,
    MANIFEST,
    READ_SECONDS,
    TEMPORARY,
    UNFINISHED_SECONDS,
    ArtifactStore,
    manifest_of,
    require_whole,
)
from registry.store.cache import Cache

if TYPE_CHECKING:
    from obstore.store import RetryConfig

CHECKPOINT = "checkpoint-"
DATA = re.compile(r"data-[0-9a-f]{12}")
RETRY: "RetryConfig" = {"max_retries": 10, "retry_timeout": datetime.timedelta(seconds=60)}
"""For so long a bucket that is out of reach is tried again before anybody hears of it."""


class ObjectStore(ArtifactStore):
    def __init__(self, bucket: obstore.store.ObjectStore, local: Path, cache_bytes: int) -> None:
        """`local`: folder of this host for what was read lately, and for unfinished work."""
        self._bucket, self._local = bucket, local
        self._cache = Cache(local / "files", cache_bytes)
        self._working = local / "checkpoints"

    @classmethod
    def of(
        cls, url: str, local: Path, cache_bytes: int, retry: "RetryConfig | None" = None
    ) -> "ObjectStore":
        """The bucket, and the folder in it, of a URL (s3://, gs://, az://).

        Credentials and endpoints are those of the environment, as the bucket's own tools read
        them. Raises StoreRefuses.
        """
        try:
            bucket = obstore.store.from_url(url, retry_config=retry or RETRY)
        except (BaseError, ValueError) as error:
            raise StoreRefuses(f"no bucket can be opened as {url}: {error}") from error
        return cls(bucket, local, cache_bytes)

    def try_out(self) -> None:
        """Write, read and delete something. Raises StoreAway and StoreRefuses."""
        name = f"tried/{uuid.uuid4().hex}"
        self.put(name, {"file": b"content"}, {})
        if self.read(name, "file") != b"content":
            raise StoreRefuses(f"{name} is not what was stored")
        self.delete(name)

    def put(self, name: str, files: Mapping[str, bytes], description: Mapping[str, Any]) -> None:
        if self.has(name):
            return
        data, at = f"data-{uuid.uuid4().hex[:12]}", 0
        places = {}
        for file, content in files.items():
            places[file] = [at, len(content)]
            at += len(content)
        manifest = manifest_of(files, {**description, "data": data, "places": places})
        with _told(name):
            try:
                if files:
                    obstore.put(self._bucket, f"{name}/{data}", b"".join(files.values()))
                obstore.put(self._bucket, f"{name}/{MANIFEST}", manifest, mode="create")
            except AlreadyExistsError:  # another was first; or we were, and the answer was lost
                if files and self.describe(name).get("data") != data:
                    obstore.delete(self._bucket, f"{name}/{data}")
            except FileNotFoundError as error:
                raise StoreRefuses(f"{name}: there is no such bucket: {error}") from error

    def replace_description(self, name: str, description: Mapping[str, Any]) -> None:
        with _told(name):
            obstore.put(self._bucket, f"{name}/{MANIFEST}", manifest_of({}, description))

    def describe(self, name: str) -> dict[str, Any]:
        try:
            manifest = self._get(f"{name}/{MANIFEST}")
            return cast(dict[str, Any], json.loads(manifest))
        except (FileNotFoundError, ValueError) as error:
            raise ArtifactError(f"{name} cannot be read: {error}") from error

    def read_all(self, name: str, files: Sequence[str]) -> list[bytes]:
        described = self.describe(name)
        return [self._read(name, file, described) for file in files]

    def _read(self, name: str, file: str, described: Mapping[str, Any]) -> bytes:
        try:
            sha256, (start, length) = described["sha256"][file], described["places"][file]
        except (KeyError, TypeError, ValueError) as error:
            raise ArtifactError(f"{name}/{file} cannot be read: {error!r}") from error

        def fetched() -> bytes:
            path = f"{name}/{described['data']}"
            try:
                with _told(name):
                    content = obstore.get_range(self._bucket, path, start=start, length=length)
            except FileNotFoundError as error:
                raise ArtifactError(f"{name}/{file} cannot be read: {error}") from error
            return require_whole(name, file, bytes(content), sha256)

        return self._cache.get(sha256, fetched) if length else b""

    def checked_path(self, name: str, file: str) -> Path | None:
        if not self.has(name):  # maybe somebody is about to put it
            return None
        try:
            described = self.describe(name)
            self._read(name, file, described)
            return self._cache.path(described["sha256"][file])
        except ArtifactError:
            self.delete(name)
            return None

    def link(self, name: str, file: str) -> str | None:
        signs = obstore.store.S3Store, obstore.store.GCSStore, obstore.store.AzureStore
        if not isinstance(self._bucket, signs):
            return None
        try:
            described = self.describe(name)
        except ArtifactError:  # nobody has put it yet
            return None
        if [*described["places"]] != [file]:  # its object has more than this
            return None
        lasts = datetime.timedelta(seconds=LINK_SECONDS)
        with _told(name):
            return obstore.sign(self._bucket, "GET", f"{name}/{described['data']}", lasts)

    def has(self, name: str, file: str = MANIFEST) -> bool:
        try:
            with _told(name):
                if file == MANIFEST:
                    obstore.head(self._bucket, f"{name}/{MANIFEST}")
                    return True
            return file in self.describe(name)["sha256"]
        except (FileNotFoundError, ArtifactError):
            return False

    def ids(self, kind: str) -> list[str]:
        with _told(kind):
            found = obstore.list_with_delimiter(self._bucket, prefix=f"{kind}/")
        return sorted(prefix.rstrip("/").rpartition("/")[2] for prefix in found["common_prefixes"])

    def idle_seconds(self, name: str) -> float:
        return _idle_seconds(self._objects(f"{name}/"))

    def delete(self, name: str) -> None:
        """The manifest first: half of an artifact is never visible."""
        paths = [each["path"] for each in self._objects(f"{name}/")]
        manifests = [path for path in paths if path.endswith(f"/{MANIFEST}")]
        with _told(name):
            for some in (manifests, [path for path in paths if path not in set(manifests)]):
                if some:
                    obstore.delete(self._bucket, some)

    def sweep(self, older_than_seconds: float) -> int:
        old_seconds, swept = max(older_than_seconds, READ_SECONDS), 0
        artifacts: dict[str, list[Any]] = {}
        for each in self._artifacts():
            folder, _, file = each["path"].rpartition("/")
            if file == MANIFEST or DATA.fullmatch(file):  # else it is not ours to delete
                artifacts.setdefault(folder, []).append(each)
        for name, objects in artifacts.items():
            parts = TEMPORARY.get(name.partition("/")[0])
            old = parts == name.count("/") + 1 and _idle_seconds(objects) > old_seconds
            whole = any(each["path"].endswith(f"/{MANIFEST}") for each in objects)
            if old or (not whole and _idle_seconds(objects) > UNFINISHED_SECONDS):
                self.delete(name)
                swept += 1
            elif whole and len(objects) > 2:
                swept += self._sweep_attempts(name, objects)
        return swept

    def _sweep_attempts(self, name: str, objects: Sequence[Any]) -> int:
        """Delete what attempts have left that were killed as another was first."""
        kept = {f"{name}/{MANIFEST}", f"{name}/{self.describe(name).get('data')}"}
        left = [
            each["path"]
            for each in objects
            if each["path"] not in kept and _idle_seconds([each]) > UNFINISHED_SECONDS
        ]
        with _told(name):
            if left:
                obstore.delete(self._bucket, left)
        return len(left)

    @contextlib.contextmanager
    def scratch(self) -> Iterator[Path]:
        self._local.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self._local, ignore_cleanup_errors=True) as folder:
            yield Path(folder)

    def free_bytes(self) -> int:
        self._local.mkdir(parents=True, exist_ok=True)
        return shutil.disk_usage(self._local).free

    def used_bytes(self) -> dict[str, int]:
        used: dict[str, int] = {}
        for each in self._artifacts():
            kind = each["path"].partition("/")[0]
            used[kind] = used.get(kind, 0) + each["size"]
        return used

    def checkpoint(self, name: str) -> Path:
        path = self._working / name
        try:
            write_file(path, self._get(name))
        except FileNotFoundError:
            path.unlink(missing_ok=True)  # nobody has begun, or it was begun anew
            path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def keep_checkpoint(self, name: str) -> None:
        path = self._working / name
        if path.exists():
            with _told(name):
                obstore.put(self._bucket, name, path)

    def drop_checkpoints(self, name: str) -> None:
        paths = [
            each["path"]
            for each in self._objects(f"{name}/")
            if each["path"].rpartition("/")[2].startswith(CHECKPOINT)
        ]
        with _told(name):
            if paths:
                obstore.delete(self._bucket, paths)
        for left in (self._working / name).glob(f"{CHECKPOINT}*"):
            left.unlink(missing_ok=True)

    def _get(self, path: str) -> bytes:
        """Content of an object. Raises FileNotFoundError."""
        with _told(path):
            return bytes(obstore.get(self._bucket, path).bytes())

    def _artifacts(self) -> Iterator[Any]:
        """Objects of all artifacts; a bucket may have others."""
        for kind in KINDS:
            yield from self._objects(f"{kind}/")

    def _objects(self, prefix: str) -> list[Any]:
        """Path, size and moment of the last write of all objects below a prefix."""
        with _told(prefix):
            chunks = obstore.list(self._bucket, prefix=prefix)
            return [each for chunk in chunks for each in chunk]


@contextlib.contextmanager
def _told(what: str) -> Iterator[None]:
    """Raise what callers know in place of what a bucket says; but FileNotFoundError as it is."""
    try:
        yield
    except (FileNotFoundError, AlreadyExistsError):
        raise
    except (PermissionDeniedError, UnauthenticatedError) as error:
        raise StoreRefuses(f"{what}: the bucket forbids it: {error}") from error
    except BaseError as error:
        raise StoreAway(f"{what}: the bucket cannot be reached: {error}") from error


def _idle_seconds(objects: Sequence[Any]) -> float:
    """Seconds since the last write to one of them; 0 where there is none."""
    if not objects:
        return 0.0
    last: datetime.datetime = max(each["last_modified"] for each in objects)
    return (datetime.datetime.now(datetime.UTC) - last).total_seconds()
