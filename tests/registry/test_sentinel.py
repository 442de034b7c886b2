"""Servers that a real Sentinel watches: one dies, and every client goes on with the other."""

import asyncio
import contextlib
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import kombu
import pytest
import redis

import worker.app  # noqa: F401  (installs the transport)
from benchmarks.deployment import free_port, wait
from fineserve.embedded import valkey_command
from registry.events import connect_async
from registry.queue import Queue, make_celery
from registry.repository import connect
from registry.settings import Settings

PASSWORD = "a#password"


@dataclass
class Watched:
    url: str
    master: "subprocess.Popen[bytes]"


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    """A server with a replica, and a Sentinel that takes a second to see that one has died."""
    command = valkey_command(tmp_path / "none", tmp_path / "none")
    binary = next(word for word in command if word.endswith("valkey-server"))
    first, second, sentinel = (free_port() for _ in range(3))
    options = [
        "--bind",
        "127.0.0.1",
        "--requirepass",
        PASSWORD,
        "--masterauth",
        PASSWORD,
        "--save",
        "",
    ]
    watching = tmp_path / "sentinel.conf"
    watching.write_text(
        f"port {sentinel}\nbind 127.0.0.1\n"
        f"sentinel monitor main 127.0.0.1 {first} 1\n"
        f'sentinel auth-pass main "{PASSWORD}"\n'
        "sentinel down-after-milliseconds main 1000\n"
        "sentinel failover-timeout main 5000\n"
    )
    commands = [
        [binary, "--port", str(first)],
        [binary, "--port", str(second), "--replicaof", f"127.0.0.1 {first}"],
        [binary, str(watching), "--sentinel"],
    ]
    with contextlib.ExitStack() as running:
        servers = []
        for i, command in enumerate(commands):
            folder = tmp_path / str(i)
            folder.mkdir()
            server = subprocess.Popen(
                [*command, *(options if i < 2 else [])], cwd=folder, stdout=subprocess.DEVNULL
            )
            servers.append(running.enter_context(server))
            running.callback(server.kill)
        wait(lambda: _is_replica(second), 30)
        with redis.Redis(port=sentinel) as asked:
            wait(lambda: asked.execute_command("SENTINEL", "REPLICAS", "main"), 30)
        secret_in_url = PASSWORD.replace("#", "%23")
        url = f"redis+sentinel://:{secret_in_url}@127.0.0.1:{sentinel}/main/1"
        yield Watched(url, servers[0])


def _is_replica(port: int) -> bool:
    """Whether it has all that the other has."""
    with contextlib.suppress(redis.ConnectionError), redis.Redis(port=port, password=PASSWORD) as r:
        return r.info("replication").get("master_link_status") == "up"
    return False


def test_every_client_goes_on_with_the_server_that_is_left(
    watched: Watched, tmp_path: Path
) -> None:
    settings = Settings(redis_url=watched.url, var_dir=tmp_path)
    client = connect(settings.resolved_redis_url)
    queue = Queue(make_celery(settings), client)
    client.set("kept", "before")
    assert client.connection_pool.connection_kwargs["db"] == 1
    queue.enqueue("fineserve.build", "m-1", "cpu")
    client.wait(1, 5000)
    watched.master.kill()

    def written() -> bool:
        with contextlib.suppress(redis.RedisError):
            return bool(client.set("written", "after"))
        return False

    wait(written, 30)
    assert client.get("kept") == "before"

    def queued() -> bool:
        with contextlib.suppress(kombu.exceptions.OperationalError):
            queue.enqueue("fineserve.build", "m-2", "cpu")
            return True
        return False

    wait(queued, 30)
    assert queue.length("build", "cpu") == 2

    async def read() -> str | None:
        async with connect_async(settings.resolved_redis_url) as asynchronous:
            found = await asynchronous.get("written")
            for sentinel in asynchronous.connection_pool.sentinel_manager.sentinels:
                await sentinel.aclose()
            return found

    assert asyncio.run(read()) == "after"
    for sentinel in client.connection_pool.sentinel_manager.sentinels:
        sentinel.close()
    client.close()
    queue._app.close()
