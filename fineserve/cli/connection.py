"""Connection of the commands to the service."""

import contextlib
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import typer
from httpx_retries import Retry

from fineserve.cli.options import UNREACHABLE, fail
from fineserve.client import Client, FineserveError, NotReady
from fineserve.transport import proxy_of, retries
from learngenes.data.images import DataError
from registry.settings import Settings, get_settings

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
    try:
        proxy = proxy_of(url)
    except ValueError as error:
        fail(f"--url {url} is no address: {error}", UNREACHABLE)
    named = urlsplit(proxy or "")
    place = f"{named.scheme}://{named.hostname}:{named.port}"  # without a password
    by = f" by the proxy {place}, of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY" if proxy else ""
    try:
        key = _key(settings)
        _require_somebody(url, proxy)
        with Client(url, key, retries(_Told)) as client:
            yield client
    except (DataError, FineserveError, NotReady) as error:
        fail(error)
    except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
        fail(f"--url {url} is no address: {error}", UNREACHABLE)
    except httpx.HTTPError as error:
        fail(f"no fineserve at {url}{by} ({error}); `fineserve up`, or say --url", UNREACHABLE)
    except (ImportError, ValueError) as error:  # httpx's, of a kind of proxy
        if not proxy:
            raise
        fail(f"{url} cannot be called{by}: {error}", UNREACHABLE)


def _key(settings: Settings) -> str | None:
    """The API key, without the end of the line it was read from."""
    key = settings.api_key.get_secret_value().strip() if settings.api_key else ""
    if not (key.isascii() and (key + "-").isprintable()):
        fail("FINESERVE_API_KEY has characters that no key has: copy the key again, and only it")
    return key or None


def _require_somebody(url: str, proxy: str | None) -> None:
    """Raise httpx.HTTPError at once where nobody answers, instead of trying again for long."""
    transport = httpx.HTTPTransport(proxy=proxy)  # which heeds SSL_CERT_FILE, as the client's does
    with httpx.Client(transport=transport, timeout=PROBE_SECONDS) as client:
        answer = client.get(f"{url}/healthz")
    if answer.status_code in NOBODY:
        answer.raise_for_status()
