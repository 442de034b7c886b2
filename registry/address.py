"""The address of Redis, read once, and written as each client reads it."""

import ssl
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

if TYPE_CHECKING:
    import redis
    import redis.asyncio

SENTINEL = "redis+sentinel"
SCHEMES = ("redis", "rediss", "unix", SENTINEL)
SENTINEL_PORT = 26379
SENTINEL_TIMEOUTS = {"socket_timeout": 3.0, "socket_connect_timeout": 3.0}
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
    password: str | None = field(repr=False)
    verifying: ssl.VerifyMode
    certificates: tuple[tuple[str, str], ...] = ()
    """Further options of TLS, in the words of redis-py, which are kombu's."""
    sentinels: tuple[tuple[str, int], ...] = ()
    """Hosts and ports of the Sentinels that know where it is now; empty where it stays."""
    master: str | None = None
    """Name that they know it by."""
    sentinel_password: str | None = field(default=None, repr=False)
    url: str = field(default="", repr=False)
    """What was given."""

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
        if scheme == SENTINEL:
            return cls._behind_sentinels(url)
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
        verified = VERIFYING[name]
        return cls(scheme, place, database, user, password, verified, more, url=url)

    @classmethod
    def _behind_sentinels(cls, url: str) -> "RedisAddress":
        """redis+sentinel://USER:PASSWORD@HOST:26379,HOST:26379/MASTER/0?sentinel_password=…"""
        form = f"it is no address of Sentinels: {SENTINEL}://USER:PASSWORD@HOST,HOST/MASTER/0"
        try:
            parts = urlsplit(url)
            secret, _, hosts = parts.netloc.rpartition("@")
            username, _, password = secret.partition(":")
            sentinels = []
            for each in hosts.split(","):
                at = urlsplit(f"//{each}")
                if at.hostname is None:
                    raise ValueError(form)
                sentinels.append((at.hostname, at.port or SENTINEL_PORT))
            master, _, database = parts.path.strip("/").partition("/")
            asked = parse_qs(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))
            sentinel_password = asked.pop("sentinel_password", [None])[-1]
            if not master or asked:
                raise ValueError(form)
            return cls(
                SENTINEL,
                f"{hosts}/{master}",
                int(database or 0),
                unquote(username) or None,
                unquote(password) or None,
                ssl.CERT_REQUIRED,
                sentinels=tuple(sentinels),
                master=master,
                sentinel_password=sentinel_password,
                url=url,
            )
        except ValueError:
            raise ValueError(form) from None

    def connect(self, **options: Any) -> "redis.Redis":
        """A client of whichever server it is now; `options` are redis-py's."""
        import redis
        from redis.sentinel import Sentinel

        if self.master is None:
            return redis.Redis.from_url(self.url, **options)
        found = Sentinel([*self.sentinels], sentinel_kwargs=self._sentinel_options)  # type: ignore[no-untyped-call]
        options = {**self._server_options, **options}
        client: redis.Redis = found.master_for(self.master, **options)  # type: ignore[no-untyped-call]
        return client

    def connect_async(self, **options: Any) -> "redis.asyncio.Redis":
        """The same for asyncio."""
        import redis.asyncio
        from redis.asyncio.sentinel import Sentinel

        if self.master is None:
            return redis.asyncio.Redis.from_url(self.url, **options)
        found = Sentinel([*self.sentinels], sentinel_kwargs=self._sentinel_options)  # type: ignore[no-untyped-call]
        options = {**self._server_options, **options}
        client: redis.asyncio.Redis = found.master_for(self.master, **options)
        return client

    @property
    def _sentinel_options(self) -> dict[str, Any]:
        secret = {} if self.sentinel_password is None else {"password": self.sentinel_password}
        return {**SENTINEL_TIMEOUTS, **secret}

    @property
    def _server_options(self) -> dict[str, Any]:
        return {"db": self.database, "username": self.username, "password": self.password}

    def __str__(self) -> str:
        return f"{self.scheme}://{self.place}/{self.database or ''}".rstrip("/")

    @property
    def for_kombu(self) -> str:
        """Address as kombu writes it."""
        secret = ""
        if self.password is not None or self.username is not None:
            secret = f"{quote(self.username or '', safe='')}:{quote(self.password or '', safe='')}@"
        if self.sentinels:
            return ";".join(
                f"sentinel://{secret}{f'[{host}]' if ':' in host else host}:{port}/{self.database}"
                for host, port in self.sentinels
            )
        if self.scheme == "unix":
            return f"redis+socket://{secret}{self.place}?virtual_host={self.database}"
        url = f"{self.scheme}://{secret}{self.place}/{self.database}"
        tls = {"ssl_cert_reqs": self.verifying.name, **dict(self.certificates)}
        return f"{url}?{urlencode(tls)}" if self.scheme == "rediss" else url

    @property
    def kombu_options(self) -> dict[str, Any]:
        """What kombu is told besides."""
        if self.master is None:
            return {}
        return {"master_name": self.master, "sentinel_kwargs": self._sentinel_options}
