"""A family of latents, served: what is denoised is decoded when it is done."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from learngenes.config import DiffusionConfig
from learngenes.data import LabelledImages
from learngenes.family import Family, load_family, save_family, write_quality
from learngenes.latents import LatentDecoder, read_autoencoder
from learngenes.pretrain import FactorisedDiT
from tests.engines import AMPLE, Gate, Model, ask, images_of, reference
from tests.learngenes.test_latents import LATENTS, autoencoder
from tests.sizing import SIZES, quality_table
from tests.worker.conftest import MakeModel
from worker.build import build, load_own
from worker.engine import Engine
from worker.runtime import Runtime

NAME = "latents"


@pytest.fixture
def families_dir(tmp_path: Path, limited_data: LabelledImages) -> Path:
    """One family, of latents, in the place of `tiny`."""
    autoencoder().save_pretrained(tmp_path / "vae")
    network, encoder, decoder = read_autoencoder(tmp_path / "vae", LATENTS)
    torch.manual_seed(0)
    made = FactorisedDiT(network)
    made.stem.decoder = decoder
    torch.nn.init.normal_(made.stem.final.weight, std=0.2)
    manifest = {
        "name": NAME,
        "network": network,
        "diffusion": DiffusionConfig(),
        "sizes": SIZES,
        "class_names": limited_data.class_names,
        "licence": "made by a test",
        "trained_steps": 1,
        "form": "any-size",
    }
    data, directory = encoder.encoded(limited_data), tmp_path / "families" / NAME
    save_family(directory, manifest, made.genes, made.stem, made.scales, data, encoder)
    write_quality(directory, quality_table(SIZES))
    return directory.parent


@pytest.fixture
def family(families_dir: Path) -> Family:
    return load_family(families_dir / NAME)


@pytest.fixture
def engine(family: Family, gate: Gate) -> Iterator[Engine]:
    engine = Engine([family], AMPLE, compile_kernels=False)
    engine.start()
    yield engine
    gate.open()
    engine.stop()


def test_images_are_those_of_one_model_alone(engine: Engine, family: Family) -> None:
    model = Model(depth=3)
    request = ask(family, model, images=6)
    images = np.stack(images_of(engine.submit(request))).astype(int)
    assert images.shape == (6, 3, 8, 8)
    assert np.abs(images - reference(family, model, request)).max() <= 1


def test_what_ends_together_is_decoded_together(
    engine: Engine, family: Family, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    together: list[int] = []
    decode = LatentDecoder.pixels

    def counted(self: LatentDecoder, latents: torch.Tensor) -> torch.Tensor:
        together.append(len(latents))
        return decode(self, latents)

    monkeypatch.setattr(LatentDecoder, "pixels", counted)
    gate.close()
    tickets = [engine.submit(ask(family, Model(seed), images=2)) for seed in range(3)]
    gate.allow(1)
    gate.open()
    assert [len(images_of(ticket)) for ticket in tickets] == [2, 2, 2]
    assert max(together) >= 4


def test_latents_that_cannot_be_decoded_fail_their_request_alone(
    engine: Engine, family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    decode = LatentDecoder.pixels

    def no_room(self: LatentDecoder, latents: torch.Tensor) -> torch.Tensor:
        if len(latents) > 2:
            raise torch.OutOfMemoryError("no room")
        return decode(self, latents)

    monkeypatch.setattr(LatentDecoder, "pixels", no_room)
    small, large = (engine.submit(ask(family, Model(n), images=n)) for n in (2, 3))
    assert len(images_of(small)) == 2
    with pytest.raises(torch.OutOfMemoryError):
        images_of(large)
    assert len(images_of(engine.submit(ask(family, images=1)))) == 1


def test_a_preview_is_an_image(engine: Engine, family: Family, gate: Gate) -> None:
    gate.close()
    ticket = engine.submit(ask(family, images=1))
    gate.allow(2)
    preview = engine.preview(ticket, 0.0)
    gate.open()
    images_of(ticket)
    assert preview is None or preview.shape == (3, 8, 8)


@pytest.mark.usefixtures("quick_verification")
def test_a_model_of_latents_is_built_and_keeps_its_budget(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model = make_model(family=NAME, budget={"max_mem_gb": 0.001})
    build(runtime, model.id)
    record = runtime.repository.models.get(model.id)
    assert record.status == "ready", record.error
    assert record.measured is not None
    assert record.measured.memory_bytes <= 1_000_000
    assert record.revision is not None
    own = load_own(runtime.store, runtime.family(NAME), model.id, record.revision)
    assert own.depth == record.plan.depth
