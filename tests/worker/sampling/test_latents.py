"""A family of latents, served: what is denoised is decoded when it is done."""

import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save

from learngenes.data.labelled import LabelledImages
from learngenes.data.latents import LatentDecoder, LatentEncoder, read_autoencoder
from learngenes.device import with_threads
from learngenes.family.family import Family, load_family, save_family, write_quality
from learngenes.sizing.cost import decoding_bytes
from learngenes.training.network import FactorisedDiT
from registry.datasets import IMAGES_FILE, Dataset, Datasets
from registry.errors import StorageFull
from registry.store import DirectoryStore, served_name
from tests.learngenes.data.test_latents import LATENTS, autoencoder
from tests.support.builds import build
from tests.support.engines import SECONDS, GatedEngine, Model, ask, images_of, reference
from tests.support.sizing import SIZES, quality_table, untrained_manifest
from tests.worker.conftest import MakeModel
from worker.artifacts import load_dataset, load_own
from worker.runtime import Runtime
from worker.sampling.jobs import Preview

NAME = "latents"


@pytest.fixture
def families_dir(tmp_path: Path, limited_data: LabelledImages) -> Path:
    """One family, of latents, in the place of `tiny`."""
    autoencoder().save_pretrained(tmp_path / "vae")
    network, encoder, decoder = read_autoencoder(tmp_path / "vae", LATENTS)
    torch.manual_seed(0)
    made = FactorisedDiT(network, (network.depth,))
    made.stem.decoder = decoder
    torch.nn.init.normal_(made.stem.final.weight, std=0.2)
    manifest = untrained_manifest(NAME, network, limited_data.class_names)
    data, directory = encoder.encoded(limited_data), tmp_path / "families" / NAME
    save_family(
        directory, manifest, made.genes, made.stem, {network.depth: made.scales}, data, encoder
    )
    write_quality(directory, quality_table(SIZES))
    return directory.parent


@pytest.fixture
def family(families_dir: Path) -> Family:
    return load_family(families_dir / NAME)


def test_images_are_those_of_one_model_alone(engine: GatedEngine, family: Family) -> None:
    model = Model(depth=3)
    request = ask(family, model, images=6)
    images = np.stack(images_of(engine.submit(request))).astype(int)
    assert images.shape == (6, 3, 8, 8)
    assert np.abs(images - reference(family, model, request)).max() <= 1


def test_what_ends_together_is_decoded_together_and_on_a_cpu_each_alone(
    engine: GatedEngine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    forward = LatentDecoder.forward

    def counted(self: LatentDecoder, latents: torch.Tensor) -> torch.Tensor:
        together.append(len(latents))
        return forward(self, latents)

    monkeypatch.setattr(LatentDecoder, "forward", counted)
    request = ask(family, images=6)
    alone = images_of(engine.submit(request))
    assert together == [1] * 6
    for where in ("learngenes.data.latents", "worker.sampling.engine"):
        monkeypatch.setattr(f"{where}.decoded_together", lambda _: 4)
    many = np.stack(images_of(engine.submit(request))).astype(int)
    assert together[6:] == [4, 2]
    assert np.abs(many - np.stack(alone)).max() <= 1


def test_each_lane_decodes_and_what_all_take_is_kept_free(
    engine: GatedEngine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    request = ask(family, images=4)
    alone = np.stack(images_of(engine.submit(request)))
    barrier, forward = threading.Barrier(2, timeout=SECONDS), LatentDecoder.forward

    def together(self: LatentDecoder, latents: torch.Tensor) -> torch.Tensor:
        barrier.wait()  # nobody passes before both lanes are there
        return forward(self, latents)

    monkeypatch.setattr(LatentDecoder, "forward", together)
    with with_threads(2):
        of_two = GatedEngine(family)
    with of_two:
        assert np.array_equal(np.stack(images_of(of_two.submit(request))), alone)
    one_image = decoding_bytes(family.manifest.network, 1)
    assert engine.residency.budget_bytes - of_two.residency.budget_bytes == one_image > 0


def test_latents_are_decoded_one_by_one_where_memory_is_short(
    engine: GatedEngine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = LatentDecoder.pixels

    def no_room(self: LatentDecoder, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 1:
            raise torch.OutOfMemoryError("no room")
        return decode(self, latents)

    for where in ("learngenes.data.latents", "worker.sampling.engine"):
        monkeypatch.setattr(f"{where}.decoded_together", lambda _: 4)
    request = ask(family, images=3)
    before = images_of(engine.submit(request))
    monkeypatch.setattr(LatentDecoder, "pixels", no_room)
    after = np.stack(images_of(engine.submit(request))).astype(int)
    assert np.abs(after - np.stack(before)).max() <= 1


def test_latents_that_cannot_be_decoded_end_their_request_and_no_other(
    engine: GatedEngine, family: Family
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LatentDecoder, "pixels", broken)
        with pytest.raises(RuntimeError, match="cannot be decoded"):
            images_of(engine.submit(ask(family, images=2)))
    assert len(images_of(engine.submit(ask(family, images=1)))) == 1


def broken(*_: object) -> torch.Tensor:
    raise RuntimeError("cannot be decoded")


def test_a_preview_is_an_image(engine: GatedEngine) -> None:
    engine.gate.close()
    job = engine.begin(images=1)
    engine.gate.allow(2)
    preview = Preview(job)
    with torch.inference_mode():
        preview.answer()  # here, since the engine waits at the gate
    engine.gate.open()
    images_of(job)
    assert preview.pixels is not None
    assert preview.pixels.shape == (3, 8, 8)


def test_a_model_of_latents_is_built_and_keeps_its_budget(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model = make_model(family=NAME, max_mem_gb=0.001)
    build(runtime, model.id)
    record = runtime.repository.models.get(model.id)
    assert record.status == "ready", record.error
    assert record.measured is not None
    assert record.measured.memory_bytes <= 1_000_000
    own = load_own(runtime.store, runtime.family(NAME), served_name(record))
    assert own.depth == record.plan.depth


def stored_dataset(runtime: Runtime) -> Dataset:
    pixels, labels = torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.tensor([0, 0, 1, 1])
    pixels[2:] = 255
    task = Dataset(
        id="t-0123456789abcdef", name="mine", family=NAME, class_names=[*"ab"], counts=[2, 2]
    )
    images = {IMAGES_FILE: save({"images": pixels, "labels": labels})}
    Datasets(runtime.store).put(task, images)
    return task


def test_a_tasks_latents_are_made_once_and_go_with_it(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, task = Datasets(runtime.store), stored_dataset(runtime)
    family = runtime.family(NAME)
    parts: list[None] = []
    first = load_dataset(runtime.store, family, task.id, lambda: parts.append(None))
    assert (first.images.shape, first.images.dtype) == ((4, 2, 4, 4), torch.float16)
    assert len(parts) == 1
    monkeypatch.setattr(LatentEncoder, "encoded", lambda *_: pytest.fail("encoded again"))
    again = load_dataset(runtime.store, family, task.id, lambda: None)
    assert torch.equal(again.images, first.images)
    assert again.class_names == ("a", "b")
    tasks.delete(task.id)
    assert not (runtime.store.root / "latents" / task.id).exists()


def test_latents_that_there_is_no_room_for_are_used_all_the_same(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, family = stored_dataset(runtime), runtime.family(NAME)

    def full(*_: object) -> None:
        raise StorageFull("no room")

    with monkeypatch.context() as patch:
        patch.setattr(DirectoryStore, "put", full)
        first = load_dataset(runtime.store, family, task.id, lambda: None)
    assert family.encoder_fingerprint is not None
    assert Datasets(runtime.store).latents(task.id, family.encoder_fingerprint) is None
    again = load_dataset(runtime.store, family, task.id, lambda: None)
    assert torch.equal(again.images, first.images)
