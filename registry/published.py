"""Families that are published in the store, for workers of every host to load.

Each version is an artifact, `published/NAME/FINGERPRINT`; `published/NAME/current` says which is
served.
"""

import contextlib
from pathlib import Path

from learngenes.files import replaced
from registry.errors import ArtifactError
from registry.store import ArtifactStore

PUBLISHED = "published"


def publish(store: ArtifactStore, directory: Path, name: str, fingerprint: str) -> None:
    """Publish the files of a family's directory. Raises StorageFull, StoreAway."""
    files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
    store.put(f"{PUBLISHED}/{name}/{fingerprint}", files, {})
    store.replace_description(f"{PUBLISHED}/{name}/current", {"fingerprint": fingerprint})


def published(store: ArtifactStore) -> dict[str, str]:
    """Fingerprint of the version of each family that is served, by the family's name."""
    found = {}
    for name in store.ids(PUBLISHED):
        with contextlib.suppress(ArtifactError, KeyError):  # else it is half there
            found[name] = str(store.describe(f"{PUBLISHED}/{name}/current")["fingerprint"])
    return found


def fetched(store: ArtifactStore, name: str, fingerprint: str, folder: Path) -> Path:
    """Directory of a published family below a folder of this host. Raises ArtifactError."""
    directory = folder / fingerprint / name
    if not directory.exists():
        artifact = f"{PUBLISHED}/{name}/{fingerprint}"
        files = list(store.describe(artifact)["sha256"])
        contents = store.read_all(artifact, files)
        with contextlib.suppress(FileExistsError), replaced(directory) as new:
            new.mkdir()
            for file, content in zip(files, contents, strict=True):
                (new / Path(file).name).write_bytes(content)
    return directory
