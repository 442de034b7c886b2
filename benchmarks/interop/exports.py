"""Check 1: exported models, sampled elsewhere, beside what the engine samples."""

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import numpy as np
import onnxruntime
import torch
from diffusers import DDIMScheduler

from benchmarks.deployment import FAMILIES
from benchmarks.parts import Figures, say
from benchmarks.serving.engine import engine, request
from learngenes.config import DType, Size
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import export_model
from learngenes.formats.onnx import DECODER_FILE, DECODER_INPUT, FILE, INPUTS, export_in_process
from learngenes.model.factors import Scales
from learngenes.model.sampling import initial_noise

PLAIN_DIFFUSERS = Path(__file__).with_name("plain_diffusers.py")
SIZES = {
    "fashion": ((2, 16), (3, 96), (5, 256), (8, 64), (10, 160), (12, 256)),
    "emoji-latents": ((3, 128), (6, 256)),
}
"""Depth and rank; of latents it is the whole `DiTPipeline` that samples."""
STEPS, GUIDANCE, IMAGES = 20, 2.0, 10
SEEDS = list(range(IMAGES))


def measure() -> Figures:
    """The largest difference of any value, of about -1 to 1, in float32."""
    figures = {}
    for name, sizes in SIZES.items():
        family = load_family(FAMILIES / name)
        for depth, rank in sizes:
            found = _differences(family, Size(depth=depth, rank=rank))
            figures[f"{name} L{depth} r{rank}"] = found
            say(f"{name} L{depth} r{rank}:", **found)
    return {
        "sizes": figures,
        "export_max_abs_diff": max(f["diffusers"] for f in figures.values()),
        "onnx_max_abs_diff": max(f["onnx"] for f in figures.values()),
    }


def _differences(family: Family, size: Size) -> dict[str, float]:
    own = family.scales_of(size)
    labels = [seed % len(family.manifest.class_names) for seed in SEEDS]
    ours = by_engine(family, size, labels)
    with tempfile.TemporaryDirectory() as directory:
        theirs = by_diffusers(family, own, labels, Path(directory))
        onnx = by_onnx(family, own, labels, Path(directory))
    if family.encoder is not None:  # the pipeline's end where an image's do
        ours, onnx = ours.clip(-1, 1), onnx.clip(-1, 1)
    return {
        "diffusers": float(np.abs(ours - theirs).max()),
        "onnx": float(np.abs(ours - onnx).max()),
    }


def by_engine(family: Family, size: Size, labels: list[int]) -> np.ndarray:
    """What the service samples, before it becomes whole numbers."""
    wanted = request(
        family,
        size,
        0,
        dtype=DType.FLOAT32,
        labels=labels,
        seeds=SEEDS,
        steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    with (
        patch("learngenes.model.dit.to_pixels", lambda x: x.cpu().clone()),  # not rounded
        patch("learngenes.data.latents.to_pixels", lambda x: x.cpu().clone()),
        engine(family=family) as (started, _),
    ):
        ticket = started.submit(wanted)
        ticket.wait(600)
        return np.stack(ticket.images()).astype(np.float32)


def by_diffusers(family: Family, own: Scales, labels: list[int], directory: Path) -> np.ndarray:
    """Sample with diffusers, in a process that cannot import this project."""
    export_model(family, own, directory)
    asked = {"steps": STEPS, "seeds": SEEDS, "labels": labels, "guidance": GUIDANCE}
    out = directory / "images.npy"
    command = [sys.executable, "-I", str(PLAIN_DIFFUSERS), str(directory), str(out)]
    subprocess.run([*command, json.dumps(asked)], check=True)
    images: np.ndarray = np.load(out)
    return images


def by_onnx(family: Family, own: Scales, labels: list[int], directory: Path) -> np.ndarray:
    export_in_process(family, own, directory)
    session = onnxruntime.InferenceSession(directory / FILE)
    scheduler = DDIMScheduler.from_pretrained(directory, subfolder="scheduler")
    scheduler.set_timesteps(STEPS)
    x = initial_noise(family.manifest.network, SEEDS)
    null_class = len(family.manifest.class_names)
    both = np.array([*labels, *[null_class] * len(labels)])
    for t in scheduler.timesteps:
        given = (torch.cat([x, x]).numpy(), np.full(len(both), int(t)), both)
        (prediction,) = session.run(None, dict(zip(INPUTS, given, strict=True)))
        conditional, unconditional = torch.from_numpy(prediction).chunk(2)
        guided = unconditional + GUIDANCE * (conditional - unconditional)
        x = scheduler.step(guided, t, x).prev_sample
    if family.encoder is None:
        return x.numpy()
    decoder = onnxruntime.InferenceSession(directory / DECODER_FILE)
    (images,) = decoder.run(None, {DECODER_INPUT: x.numpy()})
    return np.asarray(images)
