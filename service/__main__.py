"""`python -m service`: the API under uvicorn."""

import ipaddress
import sys

import uvicorn

from registry.settings import Settings, get_settings
from service.app import make_app


def check_host(settings: Settings) -> None:
    """Raises SystemExit unless the address is a loopback one, or the network can be trusted.

    Nobody is authenticated yet.
    """
    if settings.trusted_network:
        return
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        sys.exit(
            f"FINESERVE_HOST={settings.host} would let anybody in: without API keys the service "
            "listens on 127.0.0.1 only; put an authenticating proxy before it"
        )


def main() -> None:
    settings = get_settings()
    check_host(settings)
    uvicorn.run(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=30,
    )


if __name__ == "__main__":
    main()
