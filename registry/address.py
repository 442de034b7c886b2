"""The address of Redis, read once, and written as each client reads it."""

import ssl
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

SCHEMES = ("redis", "rediss", "unix")
VERIFYING = {
    "none": ssl.CERT_NONE,
    "optional": ssl.CERT_OPTIONAL,
    "required": ssl.CERT_REQUIRED,
}
"""What redis-py calls each way to look at a server's certificate."""


@dataclass(frozen=True)
class RedisAddress:
    """Where Redis is; as text, without what is secret."""

    scheme: str
    place: str
    """Host and port, or path of a socket."""
    database: int
    username: str | None
    password: str | None
    verifying: ssl.VerifyMode
    certificates: tuple[tuple[str, str], ...] = ()
    """Further options of TLS, in the words of redis-py, which are kombu's."""

    @classmethod
    def of(cls, url: str) -> "RedisAddress":
        """Address of a URL as redis-py reads it. Raises ValueError, which tells no secret."""
        from redis.connection import parse_url  # which the command line does without

        scheme = urlsplit(url).scheme
        if scheme not in SCHEMES:
            raise ValueError(
                f"it has to begin with {', '.join(f'{each}://' for each in SCHEMES)}: redis:// for "
                "a host, rediss:// for one by TLS, unix:// for a socket"
            )
        try:
            told: dict[str, Any] = parse_url(url)  # type: ignore[no-untyped-call]
            database = int(told.get("db") or 0)
            verifying = told.get("ssl_cert_reqs", "required")
        except (TypeError, ValueError):
            raise ValueError(
                "it is no address of Redis: redis://USER:PASSWORD@HOST:6379/0"
            ) from None
        if scheme != "unix" and not told.get("host"):
            raise ValueError("it names no host: redis://HOST:6379/0")
        name = str(verifying).lower().removeprefix("cert_")
        if name not in VERIFYING:
            raise ValueError(f"ssl_cert_reqs is one of {', '.join(VERIFYING)}")
        host = str(told.get("host", ""))
        at = f"[{host}]" if ":" in host else host
        place = told["path"] if scheme == "unix" else f"{at}:{told.get('port', 6379)}"
        user, password = told.get("username"), told.get("password")
        more = tuple(
            (option, str(value))
            for option, value in sorted(told.items())
            if option.startswith("ssl_") and option != "ssl_cert_reqs"
        )
        return cls(scheme, place, database, user, password, VERIFYING[name], more)

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.database or ''}".rstrip("/")

    @property
    def for_kombu(self) -> str:
        """Address as kombu writes it."""
        secret = ""
        if self.password is not None or self.username is not None:
            secret = f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"
        if self.scheme == "unix":
            return f"redis+socket://{secret}{self.place}?virtual_host={self.database}"
        url = f"{self.scheme}://{secret}{self.place}/{self.database}"
        tls = {"ssl_cert_reqs": self.verifying.name, **dict(self.certificates)}
        return f"{url}?{urlencode(tls)}" if self.scheme == "rediss" else url
