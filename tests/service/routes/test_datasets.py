"""Tasks: folders of images, and models of them."""

import asyncio
import contextlib
import io
import os
import signal
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.concurrency import run_in_threadpool
from PIL import Image
from safetensors.numpy import load

from fineserve.wire import ExportFormat
from learngenes.config import AutoencoderConfig
from learngenes.data.images import DataError
from learngenes.training.retrain import retrain
from learngenes.training.tuning import Progress
from registry.datasets import IMAGES_FILE, Datasets
from registry.errors import StorageFull
from registry.keys import Keys, Scope
from registry.settings import Settings
from service.uploads.archives import UploadLimits
from service.uploads.readers import Read, Readers
from tests.service.conftest import Stack, bearer
from tests.support.answers import refused
from tests.support.archives import Files, png, tarred, zipped
from tests.support.builds import build
from tests.support.failures import raising
from worker.export.export import model_card

FILES: Files = {
    f"{name}/{i}.png": png(shade + i) for name, shade in (("a", 20), ("b", 200)) for i in range(12)
}
PACKED = zipped(FILES).getvalue()


@pytest.fixture(autouse=True)
def briefly(settings: Settings) -> None:
    """Sigma of a task is retrained for as long as may be, which is not long here."""
    settings.retraining_max_seconds = 1


def send(stack: Stack, content: bytes = PACKED, **query: str) -> httpx.Response:
    return stack.api.post("/tasks", content=content, params=query)


def upload(stack: Stack, content: bytes = PACKED, **query: str) -> str:
    """Id of the task that the server makes of an archive."""
    answer = send(stack, content, **query)
    assert answer.status_code == 201, answer.text
    task_id = str(answer.json()["id"])
    assert answer.headers["location"] == f"/tasks/{task_id}"
    return task_id


def test_an_upload_says_what_it_is(stack: Stack) -> None:
    task = upload(stack, name="shades")
    told = stack.told(f"/tasks/{task}")
    assert told["name"] == "shades"
    assert told["family"] == "tiny"
    assert dict(zip(told["class_names"], told["counts"], strict=True)) == {"a": 12, "b": 12}
    sheet = stack.api.get(f"/tasks/{task}/preview.png")
    assert Image.open(io.BytesIO(sheet.content)).size == (80, 16)
    assert stack.told("/tasks")["tasks"] == [told]


def test_retraining_on_a_task_goes_on_from_its_checkpoint(stack: Stack) -> None:
    """No revision is before it, and the model has no directory yet."""
    model = stack.make_model(task=upload(stack))
    began_at: list[int] = []

    def watched(family: Any, scales: Any, config: Any, tell: Any, **more: Any) -> object:
        begun = len(began_at)

        def told(progress: Progress) -> None:
            if len(began_at) == begun:
                began_at.append(progress.step)
            if len(began_at) == 1 and progress.step == 2:
                stack.runtime.stopping.set()
            tell(progress)

        return retrain(family, scales, config, told, **more)

    stack.runtime.progress_seconds = 0
    for _ in range(2):
        stack.runtime.stopping.clear()
        build(stack.runtime, model, retrain=watched)
    assert stack.told(f"/models/{model}")["status"] == "ready"
    assert began_at == [1, 3]


def test_the_same_upload_twice_is_one_task(stack: Stack) -> None:
    packed = tarred(FILES, "gz").getvalue()
    assert upload(stack, packed) == upload(stack, packed)
    assert upload(stack, packed, name="another") != upload(stack, packed)
    assert len(stack.told("/tasks")["tasks"]) == 2


def test_a_model_of_a_task_samples_its_classes(stack: Stack) -> None:
    task = upload(stack, name="shades")
    model = stack.deploy(task=task).json()
    assert model["name"].startswith("shades m-")
    refused(stack.generate(model["id"]), 409)
    build(stack.runtime, model["id"])
    ready = stack.told(f"/models/{model['id']}")
    assert (ready["status"], ready["revision"], ready["task"]) == ("ready", 1, task)
    assert ready["class_names"] == ["a", "b"]
    assert ready["measured"]["memory_bytes"] <= 1.05 * ready["plan"]["predicted"]["memory_bytes"]
    generation = stack.queue(model["id"], n=2, class_labels=["b", 0])
    stack.sampler.generate(generation)
    images = stack.told(f"/generations/{generation}")["images"]
    assert [image["class_label"] for image in images] == [1, 0]
    wrong = stack.generate(model["id"], class_labels=["circle"])
    assert refused(wrong, 422)["classes"] == ["a", "b"]
    record = stack.runtime.repository.models.get(model["id"])
    assert "0 a, 1 b" in model_card(record, stack.runtime.family("tiny"), ExportFormat.NATIVE)


def test_a_refined_model_of_a_task_keeps_its_classes(stack: Stack) -> None:
    model = stack.ready_model(task=upload(stack), refine={"max_seconds": 1})
    assert stack.told(f"/models/{model}")["status"] == "ready"


def test_classes_that_are_learned_in_a_minute_are_guided_in_all_steps(stack: Stack) -> None:
    task = upload(stack)
    model, own = (stack.told(f"/models/{stack.ready_model(**of)}") for of in ({"task": task}, {}))
    fields = ("guidance_scale", "guidance_start", "guidance_stop")
    assert [model["plan"]["sampling"][name] for name in fields] == [3, 0, 1]
    assert [own["plan"]["sampling"][name] for name in fields] == [2, 0.2, 0.8]
    asked = stack.make_model(task=task, guidance_scale=2)
    assert stack.told(f"/models/{asked}")["plan"]["sampling"]["guidance_scale"] == 2


def test_a_deleted_task_fails_what_is_not_built_and_nothing_else(stack: Stack) -> None:
    task = upload(stack)
    built, waiting = stack.ready_model(task=task), stack.make_model(task=task)
    assert stack.api.delete(f"/tasks/{task}").status_code == 204
    refused(stack.api.get(f"/tasks/{task}"), 404)
    build(stack.runtime, waiting)
    assert stack.told(f"/models/{built}")["status"] == "ready"
    failed = stack.told(f"/models/{waiting}")
    assert failed["status"] == "failed"
    assert "upload its images again" in failed["error"]
    refused(stack.deploy(task=task), 404)


def test_what_had_no_time_to_learn_is_not_ready_and_can_go_on(stack: Stack) -> None:
    stack.runtime.settings.task_retraining_steps = 40
    stack.runtime.settings.task_least_steps = 40
    stack.runtime.settings.retraining_max_seconds = 1e-6
    model = stack.ready_model(task=upload(stack))
    told = stack.told(f"/models/{model}")
    assert told["status"] == "undertrained"
    assert told["training"]["steps"] < 2
    assert told["training"]["stopped"] == "time"
    assert f" of 40 steps: time; POST /models/{model}/continue goes on" in told["error"]
    assert stack.queue(model), "what there is can be looked at"

    stack.runtime.settings.retraining_max_seconds = 60
    answer = stack.api.post(f"/models/{model}/continue")
    assert (answer.status_code, answer.json()["status"]) == (202, "queued")
    refused(stack.api.post(f"/models/{model}/continue"), 409, kind="not-undertrained")
    build(stack.runtime, model)
    told = stack.told(f"/models/{model}")
    assert (told["status"], told["training"]["steps"], told["error"]) == ("ready", 40, None)


def test_what_cannot_be_used_is_said(stack: Stack) -> None:
    refused(send(stack, b"no archive"), 422, "not a whole zip or tar archive")
    refused(send(stack, b"x", family="none"), 422)
    elsewhere = stack.deploy(task=upload(stack), family="other")
    refused(elsewhere, 422, "is for the family tiny")
    for path in ("t-0", "t-0123456789abcdef", "..%2f..%2fmodels"):
        assert stack.api.get(f"/tasks/{path}").status_code == 404


def test_a_full_disk_is_507(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack.state.store, "put", raising(StorageFull("no room")))
    refused(send(stack), 507)


@pytest.mark.parametrize(
    ("setting", "value", "status"), [("max_upload_mb", 1e-4, 413), ("max_tasks", 1, 409)]
)
def test_limits_of_uploads(stack: Stack, setting: str, value: float, status: int) -> None:
    upload(stack, name="first")
    setattr(stack.runtime.settings, setting, value)
    refused(send(stack, name="second"), status)
    assert len(stack.told("/tasks")["tasks"]) == 1


def test_uploads_at_once_keep_to_the_limit(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    stack.runtime.settings.max_tasks = 1
    together = threading.Barrier(2)
    read = Readers.read

    async def at_once(*given: Any) -> Read:
        made = await read(*given)
        await run_in_threadpool(together.wait, 10)
        return made

    monkeypatch.setattr(Readers, "read", at_once)

    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda name: send(stack, name=name), ["one", "another"])
        assert sorted(answer.status_code for answer in answers) == [201, 409]


def test_a_dry_run_says_what_would_be_and_keeps_nothing(stack: Stack) -> None:
    files = {**FILES, "a/2.heic": b"of a telephone", "notes.txt": b"for nobody"}
    answer = send(stack, zipped(files).getvalue(), dry_run="true")
    assert answer.status_code == 200
    told = answer.json()
    assert dict(zip(told["class_names"], told["counts"], strict=True)) == {"a": 12, "b": 12}
    assert [(some["reason"], some["examples"]) for some in told["skipped"]] == [
        ("in a format that is not read", ["a/2.heic"]),
        ("no pictures", ["notes.txt"]),
    ]
    assert stack.told("/tasks")["tasks"] == []
    assert [*stack.runtime.store.root.glob("incoming/*")] == []


def test_an_archive_that_was_wrapped_is_told_how_to_be_sent(stack: Stack) -> None:
    def sent(content: bytes, kind: str) -> httpx.Response:
        return stack.api.post("/tasks", content=content, headers={"content-type": kind})

    refused(sent(PACKED, "multipart/form-data; boundary=x"), 415, "curl --data-binary @FILE")
    of_curl = "application/x-www-form-urlencoded"
    assert sent(PACKED, of_curl).status_code == 201
    refused(sent(PACKED.replace(b"\n", b""), of_curl), 422, "curl --data-binary @FILE")


def scans(count: int) -> bytes:
    """Progressive JPEG with so many scans, which each take time and hold nothing."""
    buffer = io.BytesIO()
    Image.new("L", (2_000, 2_000)).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    start = content.rindex(b"\xff\xda")
    return content[:start] + content[start:-2] * count + content[-2:]


def test_reading_takes_no_more_of_a_processor_than_it_may(stack: Stack) -> None:
    stack.state.settings.upload_processor_seconds = 1
    readers = Readers(1)
    stack.api.app.state.uploads.readers = readers
    bomb = zipped({"a/1.jpg": scans(2_000), "a/2.jpg": scans(2_000)}).getvalue()
    assert len(bomb) < 100_000
    began = time.monotonic()
    refused(send(stack, bomb), 422, "more than 1 s of a processor")
    assert time.monotonic() - began < 30
    assert send(stack).status_code == 201


def test_reading_takes_no_more_memory_than_it_may(stack: Stack) -> None:
    """Global headers of a tar, which each entry inherits."""
    buffer = io.BytesIO()
    with tarfile.open(
        fileobj=buffer, mode="w:gz", pax_headers={"comment": "x" * 400_000_000}
    ) as tar:
        tar.addfile(tarfile.TarInfo("a/1.png"))
    refused(send(stack, buffer.getvalue()), 422, "memory")


def bomb_of_a_minute(stack: Stack) -> tuple[Path, Path, str, UploadLimits, int, int]:
    """Arguments of `Readers.read`."""
    file, into = stack.runtime.store.root / "bomb", stack.runtime.store.root
    file.write_bytes(zipped({"a/1.jpg": scans(9_000), "a/2.jpg": scans(9_000)}).getvalue())
    return file, into, "", UploadLimits(10**9, 100, 10, 10**8), 1, 8


def test_the_reader_ends_with_its_client(stack: Stack) -> None:
    async def leave() -> None:
        readers, bomb = Readers(60), bomb_of_a_minute(stack)
        await readers.start()
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(1):
                await readers.read(*bomb)
        assert children(readers) == []
        await readers.close()

    began = time.monotonic()
    asyncio.run(leave())
    assert time.monotonic() - began < 30


def test_an_upload_whose_reader_was_ended_is_refused_and_the_next_is_read(stack: Stack) -> None:
    async def kill() -> None:
        readers, bomb = Readers(60), bomb_of_a_minute(stack)
        await readers.start()
        for victims in (lambda: children(readers), lambda: [readers._process.pid]):
            refused = asyncio.create_task(readers.read(*bomb))
            while not children(readers):
                await asyncio.sleep(0.02)
            for pid in victims():
                os.kill(pid, signal.SIGKILL)
            with pytest.raises(DataError, match="takes too much"):
                await refused
        good = stack.runtime.store.root / "good"
        good.write_bytes(PACKED)
        assert (await readers.read(good, *bomb[1:])).class_names
        await readers.close()

    asyncio.run(kill())


def test_what_nobody_thought_of_is_in_the_log(
    stack: Stack, capfd: pytest.CaptureFixture[str]
) -> None:
    async def read() -> None:
        readers, root = Readers(60), stack.runtime.store.root
        limits = UploadLimits(10**9, 100, 10, 10**8)
        with pytest.raises(DataError):
            await readers.read(root / "no-such-upload", root, "", limits, 1, 8)
        await readers.close()

    asyncio.run(read())
    assert "FileNotFoundError" in capfd.readouterr().err


def children(readers: Readers) -> list[int]:
    assert readers._process is not None
    pid = readers._process.pid
    return [*map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())]


def test_a_task_is_its_owners(stack: Stack, settings: Settings) -> None:
    keys = Keys(settings.resolved_keys_file)
    mine, other = (bearer(keys.create(owner, [Scope.DEPLOY])[1]) for owner in ("mine", "other"))
    task = stack.api.post("/tasks", content=PACKED, headers=mine).json()["id"]
    for path in (f"/tasks/{task}", f"/tasks/{task}/preview.png"):
        assert stack.api.get(path, headers=mine).status_code == 200
        refused(stack.api.get(path, headers=other), 404)
    refused(stack.api.delete(f"/tasks/{task}", headers=other), 404)
    assert stack.api.get("/tasks", headers=other).json()["tasks"] == []
    refused(stack.deploy(other, task=task), 404)
    assert stack.deploy(mine, task=task).status_code == 202
    assert stack.api.post("/tasks", content=PACKED, headers=other).json()["id"] != task


def test_nothing_is_left_of_a_refused_upload(stack: Stack, tmp_path: Path) -> None:
    send(stack, zipped({"../../evil/1.png": png()}).getvalue())
    assert stack.runtime.store.ids("tasks") == []
    assert not [*tmp_path.rglob("*evil*")]


def test_images_for_a_family_of_latents_have_the_size_of_its_images(stack: Stack) -> None:
    """Only a worker can make their latents, which are smaller."""
    described = AutoencoderConfig(
        block_out_channels=(8, 16, 16), scaling_factor=1, decoder_parameters=1, decode_bytes=(1,)
    )
    (announced,) = stack.runtime.repository.families()
    network = announced.network.model_copy(update={"autoencoder": described})
    family = announced.model_copy(update={"network": network})
    stack.runtime.repository.announce_family(family)
    images = load(Datasets(stack.runtime.store).read(upload(stack), IMAGES_FILE))["images"]
    assert images.shape[1:] == (3, 32, 32)


def test_a_model_of_a_task_is_served_whatever_becomes_of_the_task(stack: Stack) -> None:
    task = upload(stack)
    model = stack.make_model(task=task, refine={"max_seconds": 1})

    def stopped(*_: object, **__: object) -> None:
        stack.runtime.stopping.set()
        stack.runtime.leases.check_stopping()

    build(stack.runtime, model, refine=stopped)
    assert stack.told(f"/models/{model}")["status"] == "refining"
    stack.runtime.stopping.clear()
    stack.api.delete(f"/tasks/{task}")
    build(stack.runtime, model)
    told = stack.told(f"/models/{model}")
    assert (told["status"], told["revision"]) == ("ready", 1)


def test_no_process_is_left_of_clients_that_leave_at_once(stack: Stack) -> None:
    started: list[Any] = []

    async def leave() -> None:
        readers = Readers(60)
        begin = asyncio.create_subprocess_exec

        async def watched(*words: Any, **how: Any) -> Any:
            started.append(await begin(*words, **how))
            return started[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", watched)
            limits = UploadLimits(10**9, 100, 10, 10**8)
            file, into = stack.runtime.store.root / "good", stack.runtime.store.root
            file.write_bytes(PACKED)
            for pause in (0.01, 0.05, 0.3):
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(pause):
                        await readers.read(file, into, "", limits, 1, 8)
            await readers.close()
            await asyncio.sleep(0.1)

    asyncio.run(leave())
    assert started
    assert all(process.returncode is not None for process in started)
