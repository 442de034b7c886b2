"""From a folder of images to a model of them."""

import io
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

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
from tests.service.conftest import Stack
from tests.support.archives import Files, png, tarred, zipped
from tests.support.builds import build
from worker.export.export import model_card

FILES: Files = {
    f"{name}/{i}.png": png(shade + i) for name, shade in (("a", 20), ("b", 200)) for i in range(12)
}
SMALL = {"n": 2, "num_inference_steps": 2}


@pytest.fixture(autouse=True)
def briefly(settings: Settings) -> None:
    """A task's Sigma is retrained for as long as may be."""
    settings.retraining_max_seconds = 1


def upload(stack: Stack, content: bytes | None = None, **query: str) -> str:
    answer = stack.api.post("/tasks", content=content or zipped(FILES).getvalue(), params=query)
    assert answer.status_code == 201, answer.text
    task_id = str(answer.json()["id"])
    assert answer.headers["location"] == f"/tasks/{task_id}"
    return task_id


def test_an_upload_says_what_it_is(stack: Stack) -> None:
    task = upload(stack, name="shades")
    told = stack.api.get(f"/tasks/{task}").json()
    assert told["name"] == "shades"
    assert told["family"] == "tiny"
    assert dict(zip(told["class_names"], told["counts"], strict=True)) == {"a": 12, "b": 12}
    sheet = stack.api.get(f"/tasks/{task}/preview.png")
    assert Image.open(io.BytesIO(sheet.content)).size == (80, 16)
    assert stack.api.get("/tasks").json()["tasks"] == [told]


def test_retraining_on_a_task_goes_on_from_its_checkpoint(stack: Stack) -> None:
    """There is no revision before it, and no directory of the model's."""
    task = upload(stack)
    model = stack.api.post("/models", json={"max_mem_gb": 4, "task": task}).json()["id"]
    began_at: list[int] = []

    def watched(*given: Any, **more: Any) -> object:
        family, scales, config, tell = given
        steps: list[int] = []

        def told(progress: Progress) -> None:
            if not steps:
                began_at.append(progress.step)
            steps.append(progress.step)
            if len(began_at) == 1 and progress.step == 2:
                stack.runtime.stopping.set()
            tell(progress)

        return retrain(family, scales, config, told, **more)

    stack.runtime.progress_seconds = 0
    build(stack.runtime, model, retrain=watched)
    stack.runtime.stopping.clear()
    build(stack.runtime, model, retrain=watched)
    assert stack.api.get(f"/models/{model}").json()["status"] == "ready"
    assert began_at == [1, 3]


def test_the_same_upload_twice_is_one_task(stack: Stack) -> None:
    packed = tarred(FILES, "gz").getvalue()
    assert upload(stack, packed) == upload(stack, packed)
    assert upload(stack, packed, name="another") != upload(stack, packed)
    assert len(stack.api.get("/tasks").json()["tasks"]) == 2


def test_a_model_of_a_task_samples_its_classes(stack: Stack) -> None:
    task = upload(stack, name="shades")
    answer = stack.api.post("/models", json={"max_mem_gb": 4, "task": task})
    assert answer.status_code == 202, answer.text
    model = answer.json()
    assert model["name"].startswith("shades m-")
    early = stack.api.post("/generate", json={"model": model["id"], **SMALL})
    assert early.status_code == 409
    build(stack.runtime, model["id"])
    ready = stack.api.get(f"/models/{model['id']}").json()
    assert (ready["status"], ready["revision"], ready["task"]) == ("ready", 1, task)
    assert ready["class_names"] == ["a", "b"]
    assert ready["measured"]["memory_bytes"] <= 1.05 * ready["plan"]["predicted"]["memory_bytes"]
    headers = {"prefer": "respond-async"}
    body = {"model": model["id"], "class_labels": ["b", 0], **SMALL}
    accepted = stack.api.post("/generate", json=body, headers=headers)
    stack.sampler.generate(accepted.json()["id"])
    done = stack.api.get(f"/generations/{accepted.json()['id']}").json()
    assert [image["class_label"] for image in done["images"]] == [1, 0]
    wrong = stack.api.post("/generate", json={**body, "class_labels": ["circle"]})
    assert wrong.status_code == 422
    assert wrong.json()["classes"] == ["a", "b"]
    record = stack.runtime.repository.models.get(model["id"])
    assert "0 a, 1 b" in model_card(record, stack.runtime.family("tiny"), ExportFormat.NATIVE)


def test_a_refined_model_of_a_task_keeps_its_classes(stack: Stack) -> None:
    task = upload(stack)
    body = {"max_mem_gb": 4, "task": task, "refine": {"max_seconds": 1}}
    model = stack.api.post("/models", json=body).json()["id"]
    build(stack.runtime, model)
    assert stack.api.get(f"/models/{model}").json()["status"] == "ready"


def test_a_deleted_task_fails_what_is_not_built_and_nothing_else(stack: Stack) -> None:
    task = upload(stack)
    built, waiting = (
        stack.api.post("/models", json={"max_mem_gb": 4, "task": task}).json()["id"]
        for _ in range(2)
    )
    build(stack.runtime, built)
    assert stack.api.delete(f"/tasks/{task}").status_code == 204
    assert stack.api.get(f"/tasks/{task}").status_code == 404
    build(stack.runtime, waiting)
    assert stack.api.get(f"/models/{built}").json()["status"] == "ready"
    failed = stack.api.get(f"/models/{waiting}").json()
    assert failed["status"] == "failed"
    assert "upload its images again" in failed["error"]
    assert stack.api.post("/models", json={"max_mem_gb": 4, "task": task}).status_code == 404


def test_what_cannot_be_used_is_said(stack: Stack) -> None:
    answer = stack.api.post("/tasks", content=b"no archive")
    assert answer.status_code == 422
    assert "not a whole zip or tar archive" in answer.json()["detail"]
    assert stack.api.post("/tasks", content=b"x", params={"family": "none"}).status_code == 422
    task = upload(stack)
    wrong = stack.api.post("/models", json={"max_mem_gb": 4, "task": task, "family": "other"})
    assert wrong.status_code == 422
    assert "is for the family tiny" in wrong.json()["detail"]
    for path in ("t-0", "t-0123456789abcdef", "..%2f..%2fmodels"):
        assert stack.api.get(f"/tasks/{path}").status_code == 404


def test_a_full_disk_is_507(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(name: str, *_: object) -> None:
        raise StorageFull(f"no room for {name}")

    store = stack.api.app.state.fineserve.store  # type: ignore[attr-defined]
    monkeypatch.setattr(store, "put", full)
    answer = stack.api.post("/tasks", content=zipped(FILES).getvalue())
    assert answer.status_code == 507
    assert answer.headers["retry-after"]


@pytest.mark.parametrize(
    ("setting", "value", "status"), [("max_upload_mb", 1e-4, 413), ("max_tasks", 1, 409)]
)
def test_limits_of_uploads(stack: Stack, setting: str, value: float, status: int) -> None:
    upload(stack, name="first")
    setattr(stack.api.app.state.fineserve.settings, setting, value)  # type: ignore[attr-defined]
    answer = stack.api.post("/tasks", content=zipped(FILES).getvalue(), params={"name": "second"})
    assert answer.status_code == status, answer.text
    assert len(stack.api.get("/tasks").json()["tasks"]) == 1


def test_uploads_that_come_together_keep_to_the_limit(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    stack.api.app.state.fineserve.settings.max_tasks = 1  # type: ignore[attr-defined]
    together = threading.Barrier(2)

    def read(*given: Any) -> Upload:
        together.wait(10)
        return read_upload(*given)

    monkeypatch.setattr("service.datasets.read_upload", read)

    def send(name: str) -> int:
        content = zipped(FILES).getvalue()
        return stack.api.post("/tasks", content=content, params={"name": name}).status_code

    with ThreadPoolExecutor(2) as threads:
        assert sorted(threads.map(send, ["one", "another"])) == [201, 409]


def test_a_task_is_its_owners(stack: Stack, settings: Settings) -> None:
    keys = Keys(settings.resolved_keys_file)
    mine, other = (
        {"authorization": f"Bearer {keys.create(owner, [Scope.DEPLOY])[1]}"}
        for owner in ("mine", "other")
    )
    content = zipped(FILES).getvalue()
    task = stack.api.post("/tasks", content=content, headers=mine).json()["id"]
    for path in (f"/tasks/{task}", f"/tasks/{task}/preview.png"):
        assert stack.api.get(path, headers=mine).status_code == 200
        assert stack.api.get(path, headers=other).status_code == 404
    assert stack.api.delete(f"/tasks/{task}", headers=other).status_code == 404
    assert stack.api.get("/tasks", headers=other).json()["tasks"] == []
    body = {"max_mem_gb": 4, "task": task}
    assert stack.api.post("/models", json=body, headers=other).status_code == 404
    assert stack.api.post("/models", json=body, headers=mine).status_code == 202
    assert stack.api.post("/tasks", content=content, headers=other).json()["id"] != task


def test_nothing_is_left_of_a_refused_upload(stack: Stack, tmp_path: Path) -> None:
    stack.api.post("/tasks", content=zipped({"../../evil/1.png": png()}).getvalue())
    assert stack.runtime.store.directories("tasks") == []
    assert not [*tmp_path.rglob("*evil*")]


def test_images_for_a_family_of_latents_have_the_size_of_its_images(stack: Stack) -> None:
    """And not that of the latents, which only a worker can make."""
    described = AutoencoderConfig(
        block_out_channels=(8, 16, 16), scaling_factor=1, decoder_parameters=1, decode_bytes=(1,)
    )
    announced = stack.runtime.announced[0]
    network = announced.network.model_copy(update={"autoencoder": described})
    stack.runtime.announced[0] = announced.model_copy(update={"network": network})
    stack.runtime.announce_families()
    images = load(Datasets(stack.runtime.store).read(upload(stack), IMAGES_FILE))["images"]
    assert images.shape[1:] == (3, 32, 32)


def test_a_model_of_a_task_is_served_whatever_becomes_of_the_task(stack: Stack) -> None:
    task = upload(stack)
    body = {"max_mem_gb": 4, "task": task, "refine": {"max_seconds": 1}}
    model = stack.api.post("/models", json=body).json()["id"]

    def stopped(*_: object, **__: object) -> None:
        stack.runtime.stopping.set()
        stack.runtime.leases.check_stopping()

    build(stack.runtime, model, refine=stopped)
    assert stack.api.get(f"/models/{model}").json()["status"] == "refining"
    stack.runtime.stopping.clear()
    stack.api.delete(f"/tasks/{task}")
    build(stack.runtime, model)
    told = stack.api.get(f"/models/{model}").json()
    assert (told["status"], told["revision"]) == ("ready", 1)
