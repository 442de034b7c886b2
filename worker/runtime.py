"""Runtime of a worker process: settings, Redis, store, queue, device and families."""

import functools
import os
import socket
import threading
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import torch

from learngenes.device import default_device, device_class, with_threads
from learngenes.family.family import Family, FamilyError, load_family
from registry.queue import Queue, make_celery
from registry.records import FamilyRecord
from registry.repository import Repository, connect
from registry.settings import Settings
from registry.store import ArtifactStore
from worker.leases import Leases, Watch


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
    worker_id: str = field(
        default_factory=lambda: f"{socket.gethostname()}:{os.getpid()}:{time.time_ns()}"
    )
    progress_seconds: float = 0.5
    """Pause after which running work looks whether it is wanted, and tells its progress."""
    stopping: threading.Event = field(default_factory=threading.Event)
    watch: Watch = field(default_factory=Watch)
    """Watch over the one thread that builds."""
    leases: Leases = field(init=False)
    device_class: str = field(init=False)

    @classmethod
    def start(cls, settings: Settings) -> "Runtime":
        """Load every family. Raises FamilyError when one is corrupt or there is none."""
        device = default_device()
        families, directories = {}, {}
        with with_threads(1):
            for path in sorted(settings.families_dir.glob("*/family.json")):
                family = load_family(path.parent).to(device)
                families[family.manifest.name] = family
                directories[family.manifest.name] = path.parent.resolve()
        if not families:
            raise FamilyError(
                f"no family in {settings.families_dir.resolve()}; set FINESERVE_FAMILIES_DIR"
            )
        client = connect(settings.resolved_redis_url)
        return cls(
            settings=settings,
            repository=Repository(client, settings.image_ttl_seconds),
            store=ArtifactStore(settings.resolved_store_dir),
            queue=Queue(make_celery(settings), client),
            device=device,
            families=families,
            directories=directories,
        )

    def __post_init__(self) -> None:
        # now, since beside an engine a new thread counts fewer threads
        self.device_class = device_class(self.device)
        seconds = self.settings.lease_seconds
        self.leases = Leases(self.repository, seconds, self.watch, self.stopping)

    def family(self, name: str) -> Family:
        if name not in self.families:
            raise LookupError(
                f"this worker has no family {name!r} in {self.settings.families_dir}; "
                f"it has {', '.join(self.families) or 'none'}"
            )
        return self.families[name]

    def device_alone(self) -> AbstractContextManager[None]:
        """Have the device alone: those who measure wait for each other."""
        return self.leases.alone(f"device:{self.device_class}")

    def device_first(self) -> AbstractContextManager[bool]:
        """Whether nobody has the device alone; if so, nobody will meanwhile."""
        return self.leases.first(f"device:{self.device_class}")

    def announce_families(self) -> None:
        for family in self.announced:
            self.repository.announce_family(family)

    @functools.cached_property
    def announced(self) -> list[FamilyRecord]:
        return [
            FamilyRecord(
                name=name,
                network=family.manifest.network,
                sizes=family.manifest.sizes,
                class_names=list(family.manifest.class_names),
                licence=family.manifest.licence,
                trained_steps=family.manifest.trained_steps,
                fingerprint=family.fingerprint,
                quality=family.quality,
            )
            for name, family in self.families.items()
        ]
