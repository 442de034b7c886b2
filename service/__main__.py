"""`python -m service`: the API under uvicorn."""

import ipaddress
import os
import socket
import sys
from types import FrameType

import uvicorn
from fastapi import FastAPI

from registry.keys import Keys
from registry.settings import Settings, get_settings
from service.app import make_app
from service.protocol import BoundedProtocol

NICENESS = 10
"""Whatever is sent to the API waits for a worker that samples on the same processors."""
BACKLOG = 2048
"""Connections that wait to be accepted, as uvicorn has it."""


def check_host(settings: Settings) -> None:
    """Exit where anybody could come in and nobody has to show a key."""
    if settings.trusted_network or settings.require_keys:
        return
    if Keys(settings.resolved_keys_file).required:
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


class Server(uvicorn.Server):
    """uvicorn's server, whose streams end as soon as it is asked to stop."""

    def __init__(self, config: uvicorn.Config, app: FastAPI) -> None:
        super().__init__(config)
        self._app = app

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if streams := getattr(self._app.state, "streams", None):
            streams.stopping.set()
        super().handle_exit(sig, frame)


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets at an address; at both of this host's own, where it is one of them.

    `localhost` is the one of IPv6 first to many clients, which not every machine has.
    """
    hosts = ("127.0.0.1", "::1") if host in ("127.0.0.1", "localhost") else (host,)
    sockets: list[socket.socket] = []
    for address in hosts:
        try:
            family = socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)[0][0]
            made = socket.create_server((address, port), family=family, backlog=BACKLOG)
        except OSError as error:
            if sockets:
                break
            sys.exit(f"the API cannot listen on {address}:{port}: {error}")
        sockets.append(made)
    return sockets


def main() -> None:
    os.umask(0o077)
    os.nice(NICENESS)
    settings = get_settings()
    check_host(settings)
    app = make_app(settings)
    config = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=bool(settings.trusted_proxies),
        forwarded_allow_ips=settings.trusted_proxies,
        limit_concurrency=settings.max_connections,
        timeout_graceful_shutdown=30,
    )
    Server(config, app).run(listening(settings.host, settings.port))


if __name__ == "__main__":
    main()
