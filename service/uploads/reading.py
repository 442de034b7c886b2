"""`python -m service.uploads.reading`: one upload read in a process of its own, for `readers`.

It waits for a line of JSON, so that it has started before there is an upload; then it limits its
own memory and processor time, for what strangers send can take any amount of both.
"""

import ctypes
import json
import resource
import signal
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from learngenes.data.images import DataError
from service.uploads.archives import UploadLimits, preview, read_upload

MEMORY_BYTES = 768_000_000
"""Memory that reading may take, besides that of the process."""
PR_SET_PDEATHSIG = 1
"""Number of the option in Linux's prctl.h."""


def main() -> None:
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # it ends with the service, whatever it reads
    sys.stdout.write("\n")
    sys.stdout.flush()
    if not (line := sys.stdin.readline()):
        return
    task = json.loads(line)
    _limit(task["processor_seconds"])
    into = Path(task["into"])
    try:
        with Path(task["file"]).open("rb") as file:
            limits = UploadLimits(**task["limits"])
            upload = read_upload(file, limits, task["channels"], task["side"])
            images = {"images": upload.images, "labels": upload.labels}
            save_file(images, into / "images.safetensors")
            (into / "preview.png").write_bytes(preview(upload))
        told = {
            "class_names": upload.class_names,
            "counts": np.bincount(upload.labels).tolist(),
            "skipped": [asdict(some) for some in upload.skipped],
        }
    except DataError as error:
        told = {"error": str(error)}
    except MemoryError:
        told = {"error": "to read it takes too much memory; send fewer or smaller images"}
    (into / "told.json").write_text(json.dumps(told))


def _limit(processor_seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    used = resource.getrusage(resource.RUSAGE_SELF)
    seconds = int(used.ru_utime + used.ru_stime) + processor_seconds
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
