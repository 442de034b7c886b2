"""Samples a mix of models in a process of its own, whenever a line comes; runs at either commit."""

import json
import sys

import structlog

from benchmarks.serving import engine, subjects


def main(clients: int, seconds: float) -> None:
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    with engine.engine() as (started, loaded):
        mix = enumerate(subjects.sizes(subjects.MIX))
        requests = [engine.request(loaded, size, number) for number, size in mix]
        for _ in sys.stdin:
            speed = engine.images_per_second(started, requests, clients, seconds)
            sys.stdout.write(json.dumps(speed) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), float(sys.argv[2]))
