"""Ray Serve with `@serve.batch`, as in its guide "Dynamic Request Batching"."""

import asyncio
import signal

import ray
from fastapi import FastAPI, Response
from ray import serve
from ray.serve.schema import LoggingConfig

from benchmarks.serving.peers.pipeline import Pipelines, Request, Settings

app = FastAPI()


@serve.deployment
@serve.ingress(app)
class Generator:
    def __init__(self, settings: Settings) -> None:
        self.pipelines = Pipelines(settings)
        self.batch.set_max_batch_size(settings.max_batch_size)
        self.batch.set_batch_wait_timeout_s(settings.batch_timeout)

    @serve.batch
    async def batch(self, requests: list[Request]) -> list[bytes]:
        # awaited, or the replica could not take the next requests in the meantime
        return await asyncio.wrap_future(self.pipelines.submit(requests))

    @app.get("/healthz")
    def healthz(self) -> str:
        return "ok"

    @app.post("/generate")
    async def generate(self, request: Request) -> Response:
        return Response(await self.batch(request), media_type="image/png")


def main() -> None:
    settings = Settings.read()
    ray.init(num_cpus=settings.threads, include_dashboard=False, object_store_memory=100_000_000)
    serve.start(
        http_options={"host": "127.0.0.1", "port": settings.port},
        logging_config=LoggingConfig(enable_access_log=False),
    )
    generator = Generator.options(
        num_replicas=1,
        max_ongoing_requests=1000,  # the batcher queues, not the proxy
        ray_actor_options={"num_cpus": settings.threads},  # Ray sets OMP_NUM_THREADS from it
        logging_config=LoggingConfig(enable_access_log=False),
    )
    serve.run(generator.bind(settings))
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
    serve.shutdown()
    ray.shutdown()


if __name__ == "__main__":
    main()
