"""`python -m worker build` or `sample` runs a worker for one queue.

`verify` measures a model and `compile DIRECTORY` compiles a graph, for workers.
"""

import os
import sys
from pathlib import Path

from learngenes import nvml
from learngenes.device import (
    DeviceError,
    default_device,
    device_class,
    limit_threads,
    share_arenas,
    use_exact_float32,
)
from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE, queue_name
from registry.settings import get_settings
from worker.app import app
from worker.build.verify import main as verify
from worker.sampling.compiler import main as compile_graph


def main() -> None:
    os.umask(0o077)  # artifacts and logs are nobody else's
    limit_threads()
    use_exact_float32()
    nvml.remember_use()  # before there is a context of ours
    try:
        default_device()
    except DeviceError as error:  # it will not come by restarting
        sys.stderr.write(f"{error}\n")
        raise SystemExit(os.EX_CONFIG) from error
    commands = (BUILD_QUEUE, SAMPLE_QUEUE, "verify")
    if sys.argv[1:2] == ["compile"] and len(sys.argv) == 3:
        compile_graph(Path(sys.argv[2]))
        return
    if len(sys.argv) != 2 or sys.argv[1] not in commands:
        sys.exit(f"usage: python -m worker {{{'|'.join(commands)}}}")
    command = sys.argv[1]
    if command == "verify":
        verify()
        return
    settings = get_settings()
    threads = settings.max_concurrent_generations if command == SAMPLE_QUEUE else 1
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
