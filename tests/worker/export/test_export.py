"""An exported model in a process that has diffusers and nothing of ours."""

import contextlib
import io
import json
import os
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from PIL import Image

from benchmarks.interop.exports import PLAIN_DIFFUSERS
from fineserve.wire import ExportFormat
from learngenes.config import DType, Mode
from learngenes.data.latents import to_pixels
from learngenes.formats.diffusers import PIPELINE_NULL_CLASS
from learngenes.formats.native import load_model
from learngenes.formats.onnx import INPUTS
from learngenes.model import dit
from learngenes.model.sampling import initial_noise, sample
from registry.records import GenerationRecord
from registry.store import EXPORT_FILE, export_name, generation_name, image_file, served_name
from tests.learngenes.model.test_dit import inputs
from tests.support.builds import build
from tests.support.sizing import EXECUTIONS
from tests.worker.conftest import MakeGeneration, MakeModel
from worker.artifacts import load_own
from worker.export.export import export
from worker.runtime import Runtime
from worker.sampling.sample import Sampling


def unpacked(
    runtime: Runtime, model_id: str, into: Path, form: ExportFormat = ExportFormat.DIFFUSERS
) -> Path:
    export(runtime, model_id, form)
    name = export_name(runtime.repository.models.get(model_id), form)
    packed = runtime.store.read(name, EXPORT_FILE)
    with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
        tar.extractall(into, filter="data")
    return into / model_id


Served = Callable[..., tuple[GenerationRecord, np.ndarray]]


@pytest.fixture
def served(
    runtime: Runtime, sampler: Sampling, make_model: MakeModel, make_generation: MakeGeneration
) -> Served:
    """Builds a model in float32, and samples images, (N, H, W, C) of small integers."""

    def serve(**size: int) -> tuple[GenerationRecord, np.ndarray]:
        model = make_model(dtype="float32", **size)
        generation = make_generation(build(runtime, model.id).id)
        sampler.generate(generation.id)
        files = [
            runtime.store.read(generation_name(generation.id), image_file(i))
            for i in range(len(generation.seeds))
        ]
        images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
        return generation, np.stack(images).astype(int)

    return serve


@pytest.mark.parametrize("depth", [2, 4])
def test_plain_diffusers_samples_the_same_images(
    runtime: Runtime, served: Served, tmp_path: Path, depth: int
) -> None:
    generation, ours = served(depth=depth)
    directory, out = unpacked(runtime, generation.model, tmp_path), tmp_path / "images.npy"
    wanted = {
        "steps": generation.num_inference_steps,
        "seeds": generation.seeds,
        "labels": generation.class_labels,
        "guidance": generation.guidance_scale,
    }
    subprocess.run(
        [sys.executable, "-I", PLAIN_DIFFUSERS, directory, out, json.dumps(wanted)], check=True
    )
    theirs = to_pixels(torch.from_numpy(np.load(out))).permute(0, 2, 3, 1).numpy()
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("asked", [{}, {"guide": {"depth": 2, "rank": 8}}, {"scheduler": "ddim"}])
def test_what_its_card_says_samples_the_images_that_are_served(
    runtime: Runtime,
    sampler: Sampling,
    make_model: MakeModel,
    make_generation: MakeGeneration,
    tmp_path: Path,
    asked: dict[str, Any],
) -> None:
    model = build(runtime, make_model(dtype="float32", depth=4, num_inference_steps=5, **asked).id)
    generation = make_generation(model.id, **dict(model.plan.workload.sampling))
    sampler.generate(generation.id)
    ours = [
        np.asarray(Image.open(io.BytesIO(runtime.store.read(generation_name(generation.id), file))))
        for file in map(image_file, range(len(generation.seeds)))
    ]
    directory = unpacked(runtime, model.id, tmp_path)
    card = (directory / "README.md").read_text()
    code = [line[4:] for line in card.splitlines() if line.startswith("    ")]
    noise = initial_noise(runtime.family("tiny").manifest.network, generation.seeds)
    scope: dict[str, Any] = {"x": noise, "labels": torch.tensor(generation.class_labels)}
    with contextlib.chdir(directory), torch.inference_mode():
        exec("\n".join(code), scope)
    theirs = to_pixels(scope["x"]).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(np.stack(ours).astype(int) - theirs).max() <= 1


@pytest.mark.parametrize(("mode", "dtype"), [(m, d) for m, d in EXECUTIONS if d.bits is not None])
def test_few_bits_are_exported_as_they_are_served(
    runtime: Runtime,
    make_model: MakeModel,
    tmp_path: Path,
    mode: Mode,
    dtype: DType,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Unpacked: diffusers computes in float32 what this network does, which is made to here."""
    monkeypatch.setattr(dit, "compute_dtype", lambda *_: torch.float32)
    record = build(runtime, make_model(mode=mode, dtype=dtype, depth=3).id)
    directory = unpacked(runtime, record.id, tmp_path)
    theirs = DiTTransformer2DModel.from_pretrained(directory, subfolder="transformer").eval()
    family = runtime.family("tiny")
    own = load_own(runtime.store, family, served_name(record))
    assert (record.plan.mode, record.plan.dtype) == (mode, dtype)
    x, timesteps, labels = inputs(family.manifest.network)
    ours = family.assemble(own, mode, dtype)(x, timesteps, labels)
    null = len(family.manifest.class_names)
    theirs_labels = torch.where(labels == null, PIPELINE_NULL_CLASS, labels)
    with torch.no_grad():
        expected = theirs(x, timesteps, theirs_labels).sample
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)


def test_onnx_runtime_samples_the_same_images(
    runtime: Runtime, served: Served, tmp_path: Path
) -> None:
    generation, ours = served(depth=3)
    stem = runtime.family("tiny").stem
    before = [parameter.data_ptr() for parameter in stem.parameters()]
    directory = unpacked(runtime, generation.model, tmp_path, ExportFormat.ONNX)
    after = [parameter.data_ptr() for parameter in stem.parameters()]
    assert after == before  # the engine goes on with it

    session = onnxruntime.InferenceSession(directory / "model.onnx")
    scheduler = DDIMScheduler.from_pretrained(directory, subfolder="scheduler")
    scheduler.set_timesteps(generation.num_inference_steps)
    x = initial_noise(runtime.family("tiny").manifest.network, generation.seeds)
    null = [len(runtime.family("tiny").manifest.class_names)] * len(x)
    labels = np.array(generation.class_labels + null)
    for t in scheduler.timesteps:
        rows = torch.cat([x, x]).numpy()
        given = (rows, np.full(len(rows), int(t)), labels)
        (prediction,) = session.run(None, dict(zip(INPUTS, given, strict=True)))
        conditional, unconditional = torch.from_numpy(prediction).chunk(2)
        guided = unconditional + generation.guidance_scale * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    theirs = to_pixels(x).permute(0, 2, 3, 1).numpy().astype(int)
    assert np.abs(ours - theirs).max() <= 1


@pytest.mark.parametrize("form", [ExportFormat.NATIVE, ExportFormat.ADAPTER])
def test_learngenes_alone_samples_the_same_images(
    runtime: Runtime, served: Served, tmp_path: Path, form: ExportFormat
) -> None:
    generation, ours = served(depth=3, rank=8)
    directory = unpacked(runtime, generation.model, tmp_path, form)
    loaded = load_model(directory, runtime.family("tiny"))
    theirs = sample(
        loaded.network,
        loaded.manifest.diffusion,
        generation.class_labels,
        generation.seeds,
        num_inference_steps=generation.num_inference_steps,
        guidance_scale=generation.guidance_scale,
    )
    assert np.abs(ours - theirs.permute(0, 2, 3, 1).numpy().astype(int)).max() <= 1


def test_its_card_says_what_it_is(runtime: Runtime, make_model: MakeModel, tmp_path: Path) -> None:
    record = build(runtime, make_model().id)
    card = (unpacked(runtime, record.id, tmp_path) / "README.md").read_text()
    assert record.measured is not None
    assert f"# {record.name}" in card
    assert f"depth {record.plan.depth}, rank {record.plan.rank}" in card
    assert str(record.measured.memory_bytes) in card
    assert runtime.family("tiny").manifest.licence in card


def test_what_another_worker_exports_is_left_to_it(runtime: Runtime, make_model: MakeModel) -> None:
    record = build(runtime, make_model().id)
    name = export_name(record, ExportFormat.ADAPTER)
    with runtime.repository.lock(name, 60):
        export(runtime, record.id, ExportFormat.ADAPTER)
        assert not runtime.store.has(name, EXPORT_FILE)
    export(runtime, record.id, ExportFormat.ADAPTER)
    assert runtime.store.has(name, EXPORT_FILE)


def test_nothing_is_exported_of_a_model_that_cannot_be_sampled(
    runtime: Runtime, make_model: MakeModel
) -> None:
    model = make_model()
    export(runtime, model.id, ExportFormat.DIFFUSERS)
    assert not (runtime.store.root / "exports").exists()


@pytest.mark.parametrize("form", ExportFormat)
def test_whoever_unpacks_an_export_may_read_it(
    runtime: Runtime, make_model: MakeModel, form: ExportFormat
) -> None:
    record = build(runtime, make_model().id)
    before = os.umask(0o077)
    try:
        export(runtime, record.id, form)
    finally:
        os.umask(before)
    content = runtime.store.read(export_name(record, form), EXPORT_FILE)
    with tarfile.open(fileobj=io.BytesIO(content)) as tar:
        members = tar.getmembers()
    assert {oct(member.mode) for member in members if member.isdir()} == {"0o755"}
    assert {oct(member.mode) for member in members if member.isfile()} == {"0o644"}
    assert {(member.uid, member.uname) for member in members} == {(0, "")}
