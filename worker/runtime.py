"""Runtime of a worker process: settings, Redis, store, queue, device and families."""

import os
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import structlog
import torch

from learngenes.device import default_device, device_class, device_id, return_blocks, with_threads
from learngenes.family.family import Family, FamilyError, load_family
from registry.errors import ArtifactError
from registry.published import fetched, published
from registry.queue import Queue, make_celery
from registry.records import FamilyRecord
from registry.repository import Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore, open_store
from worker.leases import Leases, Watch

log = structlog.get_logger()


@dataclass
class Runtime:
    settings: Settings
    repository: Repository
    store: ArtifactStore
    queue: Queue
    device: torch.device
    families: dict[str, Family]
    directories: dict[str, Path]
    """Directory of each family."""
    problem: str = ""
    """What keeps the worker from serving everything; empty where nothing does."""
    hurry: threading.Event = field(default_factory=threading.Event)
    """Set once somebody waits for a family that is not loaded yet."""
    loaded: threading.Event = field(default_factory=threading.Event)
    """Set once every family is loaded."""
    worker_id: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
    )
    progress_seconds: float = 0.5
    """Pause after which running work looks whether it is wanted, and tells its progress."""
    stopping: threading.Event = field(default_factory=threading.Event)
    watch: Watch = field(default_factory=Watch)
    """Watch over the one thread that builds."""
    on_published: Callable[[], None] = lambda: None
    """Called when published families have been loaded."""
    _published: dict[str, str] = field(default_factory=dict)
    """Fingerprint of each family that came from the store."""
    _taking: threading.Lock = field(default_factory=threading.Lock)
    _waiting: list[Path] = field(default_factory=list)
    """Directories of families that are not loaded yet."""
    _announced: dict[str, FamilyRecord] = field(default_factory=dict)
    leases: Leases = field(init=False)
    device_class: str = field(init=False)

    @classmethod
    def start(cls, settings: Settings, *, at_once: bool = True) -> "Runtime":
        """Load every family, or the default one, and `load_rest` later.

        Raises FamilyError when one is corrupt or there is none.
        """
        directories = {
            path.parent.name: path.parent.resolve()
            for path in sorted(settings.families_dir.glob("*/family.json"))
        }
        if not directories:
            raise FamilyError(
                f"no family in {settings.families_dir.resolve()}; set FINESERVE_FAMILIES_DIR"
            )
        client = connect(settings.resolved_redis_url)
        runtime = cls(
            settings=settings,
            repository=Repository(
                client,
                settings.image_ttl_seconds,
                workers_on_demand=settings.workers_on_demand,
            ),
            store=open_store(settings),
            queue=Queue(make_celery(settings), client),
            device=default_device(),
            families={},
            directories={},
        )
        default = directories.pop(settings.default_family, None) or directories.popitem()[1]
        runtime._load(default)
        runtime._waiting = list(directories.values())
        if at_once:
            runtime.load_rest()
        return runtime

    def load_rest(self, *, despite_errors: bool = False) -> None:
        """Load the families that are not there yet.

        Raises FamilyError when one is corrupt; or goes on without it, which is a `problem`.
        """
        try:
            for directory in self._waiting:
                try:
                    self._load(directory)
                except FamilyError as error:
                    if not despite_errors:
                        raise
                    log.critical("a family is left out", reason=str(error))
                    self.problem = str(error)
        finally:  # whoever waits for one is not to wait for ever
            self._waiting = []
            self.loaded.set()

    def take_published(self) -> list[str]:
        """Load what was published in the store since, and tell its names.

        A family of this host's own directory stays before one of the same name. One that cannot
        be loaded is left out, which is a `problem`.
        """
        taken = []
        with self._taking:
            for name, fingerprint in published(self.store).items():
                ours = name in self.families and name not in self._published
                if ours or self._published.get(name) == fingerprint:
                    continue
                self._published[name] = fingerprint  # once is enough, however it ends
                try:
                    folder = self.settings.var_dir.resolve() / "families"
                    self._load(fetched(self.store, name, fingerprint, folder))
                except (ArtifactError, FamilyError) as error:
                    log.critical("a published family is left out", reason=str(error))
                    self.problem = str(error)
                    continue
                log.info("a published family is loaded", family=name)
                taken.append(name)
            if taken:
                self.on_published()
        return taken

    def _load(self, directory: Path) -> None:
        with with_threads(1):
            family = load_family(directory).to(self.device)
        name = family.manifest.name
        self.directories = {**self.directories, name: directory}
        self.families = {**self.families, name: family}  # others may be walking the one before
        networks = [each.manifest.network for each in self.families.values()]
        # full batches of a small network would take a quarter longer
        return_blocks(self.device, min(each.hidden_states_bytes for each in networks))

    def __post_init__(self) -> None:
        # now, since beside an engine a new thread counts fewer threads
        self.device_class = device_class(self.device)
        seconds = self.settings.lease_seconds
        self.leases = Leases(self.repository, seconds, self.watch, self.stopping)

    def family(self, name: str) -> Family:
        """Family of a name, once it is loaded. Raises LookupError."""
        if name not in self.families:
            self.hurry.set()
            self.loaded.wait()
        if name not in self.families:  # it may just have been published, and another told of it
            self.take_published()
        if name not in self.families:
            raise LookupError(
                f"this worker has no family {name!r} in {self.settings.families_dir}; "
                f"it has {', '.join(self.families) or 'none'}"
            )
        return self.families[name]

    @property
    def _device_lock(self) -> str:
        """Name of the lock of this one device: another host's, or the next GPU, is another."""
        return f"device:{device_id(self.device)}"

    def device_alone(self) -> AbstractContextManager[None]:
        """Have the device alone: those who measure wait for each other."""
        return self.leases.alone(self._device_lock)

    def device_wanted(self) -> bool:
        """Whether somebody waits to have the device alone."""
        return self.repository.wanted(self._device_lock)

    def device_first(self) -> AbstractContextManager[bool]:
        """Whether nobody has the device alone; if so, nobody will meanwhile."""
        return self.leases.first(self._device_lock)

    def announce_families(self) -> None:
        for name, family in self.families.items():
            if name not in self._announced:
                self._announced[name] = _announced(family)
            self.repository.announce_family(self._announced[name])


def _announced(family: Family) -> FamilyRecord:
    manifest = family.manifest
    return FamilyRecord(
        name=manifest.name,
        network=manifest.network,
        sizes=manifest.sizes,
        class_names=list(manifest.class_names),
        licence=manifest.licence,
        trained_steps=manifest.trained_steps,
        fingerprint=family.fingerprint,
        quality=family.quality,
    )
