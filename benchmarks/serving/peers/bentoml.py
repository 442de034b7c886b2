"""BentoML with adaptive batching, as in its guide "Adaptive batching".

A batchable API takes one list and returns one, so a lone request is `{"requests": [REQUEST]}` and
its answer `["BASE64"]`. The guide also has a second service in front, with the parameters of one
request; its connection to the first is closed every 100 requests (`max_requests` of
`RemoteProxy`), which fails those in flight, so it is not used here.

The dispatcher runs its first eleven batches with one request each, or few, to learn how long they
take: send it a dozen real requests before measuring. It chooses its own waiting time.
"""

import base64
import os
import sys

import bentoml

from benchmarks.serving.peers.pipeline import Pipelines, Request, Settings

SERVICE = "benchmarks.serving.peers.bentoml:Generator"
MAX_LATENCY_MS = 300_000
"""BentoML answers 503 to requests that it expects to take longer."""
settings = Settings.read()


@bentoml.service(
    workers=1,
    threads=1,
    traffic={"timeout": 600},
    metrics={"enabled": False},
    logging={"access": {"enabled": False}},
)
class Generator:
    def __init__(self) -> None:
        self.pipelines = Pipelines(settings)

    @bentoml.api(
        batchable=True, max_batch_size=settings.max_batch_size, max_latency_ms=MAX_LATENCY_MS
    )
    def generate(self, requests: list[Request]) -> list[str]:
        return [base64.b64encode(png).decode() for png in self.pipelines.generate(requests)]


def main() -> None:
    """Becomes the command that the documentation starts a service with."""
    address = ["--host", "127.0.0.1", "--port", str(settings.port)]
    command = [sys.executable, "-m", "bentoml", "serve", SERVICE, *address]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
