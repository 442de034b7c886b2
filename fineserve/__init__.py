"""The client, the command line, and the embedded default that `make up` starts."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fineserve.client import AsyncClient, Client

__all__ = ["AsyncClient", "Client"]


def __getattr__(name: str) -> Any:
    """Import the client when it is asked for: the command line starts without it."""
    if name in __all__:
        from fineserve import client

        return getattr(client, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
