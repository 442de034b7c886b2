"""FastAPI and uvicorn, one request after the other: what a first deployment looks like."""

import uvicorn
from fastapi import FastAPI, Response

from benchmarks.serving.peers.pipeline import Pipelines, Request, Settings


def application(pipelines: Pipelines) -> FastAPI:
    app = FastAPI()

    @app.get("/healthz")
    def healthz() -> str:
        return "ok"

    @app.post("/generate")
    def generate(request: Request) -> Response:
        (png,) = pipelines.generate([request])  # waits in FastAPI's thread pool for its turn
        return Response(png, media_type="image/png")

    return app


def main() -> None:
    settings = Settings.read()
    app = application(Pipelines(settings))
    uvicorn.run(app, host="127.0.0.1", port=settings.port, access_log=False)


if __name__ == "__main__":
    main()
