"""A task of three drawn shapes: `ready` means that the asked shape is drawn.

The same is asked again with no time to learn, which must not become ready.
"""

import io
import math
import random
import zipfile

import numpy as np
import torch
from PIL import Image, ImageDraw

from benchmarks.deployment import Deployment, pixels
from benchmarks.parts import REPOSITORY, Figures, say
from learngenes.data.labelled import LabelledImages
from learngenes.judging.classifier import accuracy, train_classifier

SHAPES = ("circle", "square", "triangle")
PER_SHAPE = 20
SAMPLES, AT_ONCE = 300, 60
SIDE = 28
PICTURE = REPOSITORY / "benchmarks" / "start" / "shapes.png"


def measure() -> Figures:
    judge = train_classifier(_drawn(2000, seed=1), epochs=3)
    unseen = accuracy(judge, _drawn(200, seed=2))
    with Deployment() as deployment:
        deployment.up()
        task = deployment.client.create_task(io.BytesIO(_archive(_drawn(PER_SHAPE, seed=0))))
        model = deployment.client.create_model(max_mem_gb=4, task=task.id)
        model = deployment.wait_model(
            model.id, lambda m: m.status in ("ready", "undertrained"), 1200
        )
        continued = 0
        while model.status == "undertrained":
            say("undertrained", error=model.error)
            continued += 1
            deployment.client.continue_model(model.id)
            model = deployment.wait_model(
                model.id, lambda m: m.status in {"ready", "undertrained"}, 1200
            )
        found, images = _judged(deployment, model.id, judge)
    Image.fromarray(np.hstack([*images[:9]])).save(PICTURE)
    with Deployment(retraining_max_seconds=2) as hurried:
        hurried.up()
        task = hurried.client.create_task(io.BytesIO(_archive(_drawn(PER_SHAPE, seed=0))))
        late = hurried.client.create_model(max_mem_gb=4, task=task.id)
        late = hurried.wait_model(late.id, lambda m: m.status in ("ready", "undertrained"), 1200)
    assert model.training is not None
    assert late.training is not None
    return {
        "judge_accuracy": round(unseen, 3),
        "task_accuracy": round(found, 3),
        "task_steps": model.training.steps,
        "task_seconds": model.training.seconds,
        "continued": continued,
        "without_time": late.status,
        "without_time_steps": late.training.steps,
    }


def _judged(deployment: Deployment, model: str, judge: torch.nn.Module) -> tuple[float, np.ndarray]:
    """Share of samples that show the shape that was asked for, and the samples."""
    shown = []
    for start in range(0, SAMPLES, AT_ONCE):
        images = deployment.client.generate(model, n=AT_ONCE, seed=start, class_labels=[*SHAPES])
        shown.append(pixels(images))
    samples = np.concatenate(shown)
    labels = torch.arange(SAMPLES) % len(SHAPES)
    grey = torch.from_numpy(samples)[:, None]
    return accuracy(judge, LabelledImages(grey, labels, SHAPES)), samples


def _drawn(per_shape: int, seed: int) -> LabelledImages:
    """Filled shapes of random size, place and angle, white on black."""
    chance = random.Random(seed)
    images, labels = [], []
    for index in range(per_shape * len(SHAPES)):
        label = index % len(SHAPES)
        picture = Image.new("L", (4 * SIDE, 4 * SIDE))
        radius = chance.uniform(26, 42)
        x, y = (chance.uniform(radius + 2, 4 * SIDE - radius - 2) for _ in "xy")
        corners = {"circle": 60, "square": 4, "triangle": 3}[SHAPES[label]]
        turn = chance.uniform(0, 2 * math.pi)
        angles = [turn + 2 * math.pi * i / corners for i in range(corners)]
        points = [(x + radius * math.cos(a), y + radius * math.sin(a)) for a in angles]
        ImageDraw.Draw(picture).polygon(points, fill=255)
        images.append(np.asarray(picture.resize((SIDE, SIDE), Image.Resampling.LANCZOS)))
        labels.append(label)
    return LabelledImages(torch.from_numpy(np.stack(images))[:, None], torch.tensor(labels), SHAPES)


def _archive(data: LabelledImages) -> bytes:
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for index, (image, label) in enumerate(zip(data.images, data.labels.tolist(), strict=True)):
            file = io.BytesIO()
            Image.fromarray(image[0].numpy()).save(file, "png")
            archive.writestr(f"{SHAPES[label]}/{index}.png", file.getvalue())
    return content.getvalue()
