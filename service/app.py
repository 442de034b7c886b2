"""The FastAPI application: `uvicorn --factory service.app:make_app`."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi_offline import FastAPIOffline

from registry import tracing
from registry.logs import configure_logging
from registry.settings import Settings, get_settings
from service import problems
from service.datasets import Uploads
from service.deps import State
from service.guard import Guard
from service.metrics import Scrapes, instrument
from service.openapi import complete
from service.routes import ROUTES, page
from service.status import Snapshots
from service.streams import Streams

DESCRIPTION = "On-demand model sizing: send a budget, get a diffusion transformer that fits it."


def make_app(settings: Settings | None = None) -> FastAPI:
    settings = settings or get_settings()

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        configure_logging(settings.log_format)
        state = State(settings)
        app.state.fineserve, app.state.snapshots = state, Snapshots(state)
        app.state.uploads, app.state.streams = Uploads(state), Streams()
        app.state.scrapes = Scrapes(state)
        readers = app.state.uploads.readers
        await readers.start()
        yield
        await readers.close()
        await state.events.aclose()

    app = FastAPIOffline(  # the documentation's script from here, not from a host elsewhere
        title="fineserve",
        description=DESCRIPTION,
        version="0.1.0",
        lifespan=lifespan,
        redoc_url=None,
        redirect_slashes=False,  # each would be counted under its own path
    )
    problems.install(app)
    instrument(app)
    if tracing.start("service"):
        from opentelemetry.instrumentation.fastapi import FastAPIInstrumentor

        FastAPIInstrumentor.instrument_app(
            app,
            excluded_urls="healthz,readyz,metrics,status,page",  # dashboards and probes
            exclude_spans=["receive", "send"],
        )
    app.add_middleware(Guard)
    for part in ROUTES:
        app.include_router(part.router)
    app.mount("/page", page.files)
    complete(app)
    return app
