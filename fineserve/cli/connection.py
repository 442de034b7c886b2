"""The service as commands reach it."""

import contextlib
from collections.abc import Iterator

import httpx
import typer
from httpx_retries import Retry

from fineserve.cli.options import UNREACHABLE, fail
from fineserve.client import Client, FineserveError, NotReady
from fineserve.transport import retries
from learngenes.data.images import DataError
from registry.settings import get_settings

PROBE_SECONDS = 10
NOBODY = (502, 504)
"""How a proxy says that there is nobody behind it."""


class _Told(Retry):
    """Whoever waits at a terminal hears what for."""

    def sleep(self, response: httpx.Response | Exception) -> None:
        why = response.status_code if isinstance(response, httpx.Response) else response
        typer.secho(f"  asking again ({why})", err=True, dim=True)
        super().sleep(response)


@contextlib.contextmanager
def connected(url: str | None) -> Iterator[Client]:
    """The service; by default this host's. What it refuses is one line and an exit code."""
    settings = get_settings()
    url = url or f"http://{settings.host}:{settings.port}"
    key = settings.api_key.get_secret_value() if settings.api_key else None
    try:
        _require_somebody(url)
        with Client(url, key, retries(_Told)) as client:
            yield client
    except (DataError, FineserveError, NotReady) as error:
        fail(error)
    except httpx.HTTPError as error:
        fail(f"no fineserve at {url} ({error}); `fineserve up`, or say --url", UNREACHABLE)


def _require_somebody(url: str) -> None:
    """Nobody waits for as many tries as the client makes where there is nobody to be tried."""
    answer = httpx.get(f"{url}/healthz", timeout=PROBE_SECONDS)
    if answer.status_code in NOBODY:
        answer.raise_for_status()
