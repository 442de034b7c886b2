"""`python -m service`: the API under uvicorn."""

import ipaddress
import sys

import uvicorn

from registry.keys import Keys
from registry.settings import Settings, get_settings
from service.app import make_app
from service.protocol import BoundedProtocol


def check_host(settings: Settings) -> None:
    """Exit where anybody could come in and nobody has to show a key."""
    if settings.trusted_network or Keys(settings.resolved_keys_file).required:
        return
    host = "127.0.0.1" if settings.host == "localhost" else settings.host
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        sys.exit(
            f"FINESERVE_HOST={settings.host} would let anybody in: make an API key with `fineserve "
            "keys create`; without one the service listens on 127.0.0.1 only"
        )


def main() -> None:
    settings = get_settings()
    check_host(settings)
    uvicorn.run(
        make_app(settings),
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        timeout_graceful_shutdown=30,
    )


if __name__ == "__main__":
    main()
