"""The Python client against a real server."""

import asyncio
import http.server
import io
import tarfile
import threading
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
from httpx_sse import EventSource, ServerSentEvent
from PIL import Image

import fineserve
from fineserve import AsyncClient, Client
from fineserve.client import FineserveError, GeneratedImage, NotReady
from registry.settings import Settings
from tests.support.archives import PETS, unpacked, zipped
from tests.support.commands import made

STARS = {"class_labels": ["star"], "num_inference_steps": 2, "seed": 3}


def test_from_a_budget_to_images(url: str, working: None, tmp_path: Path) -> None:
    heard: list[str] = []
    with Client(url) as client:
        assert client.plan(max_mem_gb=4).plan.quality == 1
        made = client.create_model(max_mem_gb=4, name="mine")
        model = client.wait(made.id, lambda name, _: heard.append(name))
        assert (model.status, model.name) == ("ready", "mine")
        assert "status" in heard
        images = client.generate(model.id, **{**STARS, "class_labels": ["star", 0]}, n=3)
        assert [(image.class_label, image.seed) for image in images] == [(3, 3), (0, 4), (3, 5)]
        images[0].save(tmp_path / "one.png")
        assert Image.open(io.BytesIO(images[0].png)).size == (8, 8)
        assert (tmp_path / "one.png").read_bytes() == images[0].png
        assert [m.id for m in client.models()] == [model.id]
        task = client.create_task(unpacked(PETS, tmp_path / "pets"), name="pets")
        assert [t.class_names for t in client.tasks()] == [["cat", "dog"]]
        of_pets = client.wait(client.create_model(max_mem_gb=4, task=task.id).id)
        assert of_pets.class_names == ["cat", "dog"]
        client.delete_task(task.id)
        client.delete_model(model.id)
        with pytest.raises(NotReady, match="deleted"):
            client.wait(model.id)


def test_both_clients_get_the_same_images(url: str, working: None) -> None:
    heard: list[str] = []

    async def all_of_it() -> tuple[str, list[GeneratedImage]]:
        async with AsyncClient(url) as client:
            plan = await client.plan(max_mem_gb=4)
            made = await client.create_model(max_mem_gb=4, depth=plan.plan.depth)
            model = await client.wait(made.id, lambda name, _: heard.append(name))
            task = await client.create_task(io.BytesIO(zipped(PETS).getvalue()))
            assert [t.id for t in await client.tasks()] == [task.id]
            await client.delete_task(task.id)
            images = await client.generate(model.id, **STARS)
            assert [m.id async for m in client.models()] == [model.id]
            with pytest.raises(FineserveError, match="cannot be cancelled"):
                await client.cancel_model(model.id)
            return model.id, images

    async def delete(model: str) -> None:
        async with AsyncClient(url) as client:
            await client.delete_model(model)

    model, images = asyncio.run(all_of_it())
    assert "status" in heard
    with Client(url) as client:
        assert client.generate(model, **STARS) == images
        asyncio.run(delete(model))
        assert list(client.models()) == []


def test_steps_are_heard_while_images_are_made(url: str, working: None) -> None:
    model = made(url)
    heard: list[str] = []
    with Client(url) as client:
        images = client.generate(model, lambda name, _: heard.append(name), **STARS)
        assert client.generate(model, **STARS) == images
    assert heard.count("status") >= 2

    async def awaited() -> list[GeneratedImage]:
        async with AsyncClient(url) as client:
            return await client.generate(model, lambda *_: None, **STARS)

    assert asyncio.run(awaited()) == images


def test_a_stream_that_breaks_off_is_gone_on_with(
    url: str, working: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A service that is restarted breaks off its streams."""
    breaks = [1, 2]
    whole, whole_async = EventSource.iter_sse, EventSource.aiter_sse

    def break_off() -> None:
        if breaks:
            breaks.pop()
            raise httpx.RemoteProtocolError("closed")

    def broken(self: EventSource) -> Iterator[ServerSentEvent]:
        for event in whole(self):
            yield event
            break_off()

    async def broken_async(self: EventSource) -> AsyncIterator[ServerSentEvent]:
        async for event in whole_async(self):
            yield event
            break_off()

    monkeypatch.setattr(EventSource, "iter_sse", broken)
    monkeypatch.setattr(EventSource, "aiter_sse", broken_async)
    heard: list[str] = []
    with Client(url) as client:
        made_now = client.create_model(max_mem_gb=4)
        model = client.wait(made_now.id, lambda _, content: heard.append(str(content)))
    assert (model.status, breaks) == ("ready", [])
    assert sum("'queued'" in content for content in heard) == 1  # not from the beginning again

    async def awaited() -> str:
        async with AsyncClient(url) as client:
            return (await client.wait((await client.create_model(max_mem_gb=4)).id)).status

    breaks.append(1)
    assert asyncio.run(awaited()) == "ready"
    assert breaks == []


def test_a_model_without_room_is_sent_again(url: str, settings: Settings, working: None) -> None:
    settings.max_active_models = 1
    with Client(url) as client:
        made = [client.create_model(max_mem_gb=4).id for _ in range(3)]
        assert len(set(made)) == 3
        assert all(client.wait(model).status == "ready" for model in made)


def test_a_refusal_says_what_it_is(url: str) -> None:
    with Client(url) as client:
        with pytest.raises(FineserveError) as refused:
            client.create_model(max_mem_gb=1e-6)
        assert (refused.value.status, refused.value.kind) == (422, "infeasible-budget")
        assert refused.value.problem["nearest_feasible"]
        model = client.create_model(max_mem_gb=4).id
        assert client.cancel_model(model).status == "cancelled"
        with pytest.raises(NotReady) as ended:
            client.wait(model)
        assert ended.value.model.status == "cancelled"
    with (
        Client(f"{url}/nowhere") as client,
        pytest.raises(FineserveError, match="there is no such path"),
    ):
        client.tasks()


def test_the_package_has_no_name_but_its_own() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Server'"):
        _ = fineserve.Server


def test_a_key_does_not_follow_an_export_to_the_bucket(tmp_path: Path) -> None:
    keys: list[str | None] = []
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        member = tarfile.TarInfo("m-1/own.safetensors")
        member.size = 3
        tar.addfile(member, io.BytesIO(b"abc"))

    class Bucket(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            keys.append(self.headers.get("authorization"))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(content.getvalue())

        def log_message(self, *_: object) -> None: ...

    class Service(Bucket):
        def do_GET(self) -> None:
            keys.append(self.headers.get("authorization"))
            self.send_response(307)
            self.send_header("location", f"http://127.0.0.1:{bucket.server_port}/signed")
            self.end_headers()

    servers = [http.server.HTTPServer(("127.0.0.1", 0), kind) for kind in (Bucket, Service)]
    bucket, service = servers
    threads = [threading.Thread(target=server.serve_forever) for server in servers]
    for thread in threads:
        thread.start()
    try:
        with Client(f"http://127.0.0.1:{service.server_port}", api_key="secret") as client:
            exported = client.export("m-1", tmp_path)
    finally:
        for server, thread in zip(servers, threads, strict=True):
            server.shutdown()
            thread.join()
            server.server_close()
    assert (exported / "own.safetensors").read_bytes() == b"abc"
    assert keys == ["Bearer secret", None]
