"""The artifact store: the truth for what is finished; directories, or objects of a bucket."""

from registry.settings import Settings
from registry.store.artifacts import (
    EXPORT_FILE,
    MANIFEST,
    PREVIEWS_FILE,
    ArtifactStore,
    export_name,
    family_name,
    generation_name,
    image_file,
    record_name,
    served_name,
)
from registry.store.directory import DirectoryStore

__all__ = [
    "EXPORT_FILE",
    "MANIFEST",
    "PREVIEWS_FILE",
    "ArtifactStore",
    "DirectoryStore",
    "export_name",
    "family_name",
    "generation_name",
    "image_file",
    "open_store",
    "record_name",
    "served_name",
]


def open_store(settings: Settings) -> ArtifactStore:
    """The store that the settings name."""
    if settings.store_url is None:
        return DirectoryStore(settings.resolved_store_dir)
    from registry.store.objects import ObjectStore  # a directory needs nothing of it

    cache_bytes = round(settings.store_cache_gb * 1e9)
    return ObjectStore.of(settings.store_url, settings.var_dir / "store-cache", cache_bytes)
