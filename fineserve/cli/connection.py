"""Connection of the commands to the service."""

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
"""Statuses by which a proxy says that nobody is behind it."""


class _Told(Retry):
    """Retry that tells whoever waits at a terminal what for."""

    def sleep(self, response: httpx.Response | Exception) -> None:
        why = response.status_code if isinstance(response, httpx.Response) else response
        typer.secho(f"  asking again ({why})", err=True, dim=True)
        super().sleep(response)


@contextlib.contextmanager
def connected(url: str | None) -> Iterator[Client]:
    """Client of the service, by default this host's. A refusal is one line and an exit code."""
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
    """Raise httpx.HTTPError at once where nobody answers, instead of trying again for long."""
    answer = httpx.get(f"{url}/healthz", timeout=PROBE_SECONDS)
    if answer.status_code in NOBODY:
        answer.raise_for_status()
