"""`python -m service.uploads.reading`: a process that reads uploads, each in a copy of itself.

It has imported everything before there is an upload, so that a copy is there in milliseconds. A
copy limits its own memory and processor time: what strangers send can take any amount of both.

Lines of JSON come in: `{"number": 1, "task": {…}}` begins, `{"number": 1}` ends what has begun.
A line `number status` goes out when a copy has ended, and an empty one when all is there.
"""

import ctypes
import gc
import json
import os
import resource
import selectors
import signal
import traceback
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from safetensors.numpy import save_file

from learngenes.data.images import DataError
from service.uploads.archives import UploadLimits, preview, read_upload

MEMORY_BYTES = 768_000_000
"""Memory that reading may take, besides that of the process."""
PR_SET_PDEATHSIG = 1
"""Number of the option in Linux's prctl.h."""
TASKS, ENDS = 0, 1
"""File descriptors."""


def main() -> None:
    _end_with_parent()
    gc.freeze()  # what is there is shared by all copies
    reading: dict[int, tuple[int, int]] = {}
    """Number and process of each upload, by the descriptor that its end closes."""
    selector = selectors.DefaultSelector()
    selector.register(TASKS, selectors.EVENT_READ)
    os.write(ENDS, b"\n")
    heard = b""
    while True:
        for key, _ in selector.select():
            if key.fd != TASKS:
                selector.unregister(key.fd)
                number, process = reading.pop(key.fd)
                os.close(key.fd)
                status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
                os.write(ENDS, f"{number} {status}\n".encode())
                continue
            if not (piece := os.read(TASKS, 65_536)):
                return
            *lines, heard = (heard + piece).split(b"\n")
            for told in map(json.loads, lines):
                if "task" in told:
                    process, alive = _copy(told["task"])
                    reading[alive] = told["number"], process
                    selector.register(alive, selectors.EVENT_READ)
                else:
                    for number, process in reading.values():
                        if number == told["number"]:
                            os.kill(process, signal.SIGKILL)


def _copy(task: dict[str, Any]) -> tuple[int, int]:
    """A process that reads an upload, and a descriptor that becomes readable when it has ended."""
    alive, held = os.pipe()
    own = os.getpid()
    process = os.fork()
    if not process:
        _read(task, own)
    os.close(held)
    return process, alive


def _read(task: dict[str, Any], parent: int) -> NoReturn:
    status = os.EX_SOFTWARE
    try:
        _end_with_parent()
        if os.getppid() != parent:  # which ended before that
            os._exit(status)
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, TASKS)
        os.dup2(nothing, ENDS)
        _limit(task["processor_seconds"])
        (Path(task["into"]) / "told.json").write_text(json.dumps(_told(task)))
        status = os.EX_OK
    except Exception:
        traceback.print_exc()  # all that operators see of it: its sender is told of limits
    finally:
        os._exit(status)  # nothing of the process that this is a copy of


def _told(task: dict[str, Any]) -> dict[str, Any]:
    into = Path(task["into"])
    try:
        with Path(task["file"]).open("rb") as file:
            limits = UploadLimits(**task["limits"])
            upload = read_upload(file, limits, task["channels"], task["side"])
            images = {"images": upload.images, "labels": upload.labels}
            save_file(images, into / "images.safetensors")
            (into / "preview.png").write_bytes(preview(upload))
    except DataError as error:
        return {"error": str(error)}
    except MemoryError:
        return {"error": "to read it takes too much memory; send fewer or smaller images"}
    return {
        "class_names": upload.class_names,
        "counts": np.bincount(upload.labels).tolist(),
        "skipped": [asdict(some) for some in upload.skipped],
    }


def _end_with_parent() -> None:
    """Whatever this process does then: it ends with the service."""
    if prctl := getattr(ctypes.CDLL(None), "prctl", None):
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _limit(processor_seconds: int) -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    memory = pages * resource.getpagesize() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CPU, (processor_seconds, processor_seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


if __name__ == "__main__":
    main()
