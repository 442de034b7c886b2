"""`python -m worker build` or `python -m worker sample`: one worker for one queue."""

import sys

from registry.queue import BUILD_QUEUE, SAMPLE_QUEUE
from worker.app import app


def main() -> None:
    queues = (BUILD_QUEUE, SAMPLE_QUEUE)
    if len(sys.argv) != 2 or sys.argv[1] not in queues:
        sys.exit(f"usage: python -m worker {{{'|'.join(queues)}}}")
    queue = sys.argv[1]
    app.worker_main(
        [
            "worker",
            *("--queues", queue),
            *("--hostname", f"{queue}@%h"),
            *("--pool", "threads"),
            *("--concurrency", "1"),
            *("--loglevel", "INFO"),
            "--without-gossip",
            "--without-mingle",
        ]
    )


if __name__ == "__main__":
    main()
