"""Tasks: folders of images, and models of them."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image
from safetensors.numpy import load

from fineserve.wire import ExportFormat
from learngenes.config import AutoencoderConfig
from learngenes.training.retrain import retrain
from learngenes.training.tuning import Progress
from registry.datasets import IMAGES_FILE, Datasets
from registry.errors import StorageFull
from registry.keys import Keys, Scope
from registry.settings import Settings
from service.uploads import Upload, read_upload
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

    def read(*given: Any) -> Upload:
        together.wait(10)
        return read_upload(*given)

    monkeypatch.setattr("service.datasets.read_upload", read)

    with ThreadPoolExecutor(2) as threads:
        answers = threads.map(lambda name: send(stack, name=name), ["one", "another"])
        assert sorted(answer.status_code for answer in answers) == [201, 409]


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
    assert stack.runtime.store.directories("tasks") == []
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
