"""`python -m worker build` or `sample`: one worker for one queue; `verify` measures a model."""

import ctypes
import os
import sys

from learngenes.device import default_device, device_class
from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE, queue_name
from registry.settings import get_settings
from worker.app import app
from worker.verify import main as verify

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
MOST_ARENAS = 2


def share_arenas() -> None:
    """Let all threads take memory from a few heaps, where the C library is glibc.

    It gives up to eight heaps a core to threads that ask at the same time, and what a request of
    one thread leaves free in its heap is of no use to the other threads.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, MOST_ARENAS)


def main() -> None:
    commands = (BUILD_QUEUE, SAMPLE_QUEUE, "verify")
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m worker {{{'|'.join(commands)}}}")
    command = sys.argv[1]
    if command == "verify":
        verify()
        return
    settings = get_settings()
    threads = settings.max_concurrent_generations if command == SAMPLE_QUEUE else 1
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.var_dir.resolve() / "kernels"))
    share_arenas()
    app.worker_main(
        [
            "worker",
            *("--queues", queue_name(command, device_class(default_device()))),
            *("--hostname", f"{command}@%h"),
            *("--pool", "threads"),
            *("--concurrency", str(threads)),
            *("--loglevel", "INFO"),
            "--without-gossip",
            "--without-mingle",
        ]
    )


if __name__ == "__main__":
    main()
