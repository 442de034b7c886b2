"""Check 5: a task of 50 images a class, by the service; FD before and after Sigma."""

import io
import time
import zipfile

import torch

from benchmarks.deployment import FAMILIES, Deployment, pixels
from benchmarks.parts import REPOSITORY, Figures
from fineserve import Client
from learngenes.config import Mode, Scheduler, Size
from learngenes.data import labelled
from learngenes.data.images import as_picture, encode_png
from learngenes.data.labelled import LabelledImages
from learngenes.family.family import load_family
from learngenes.judging.frechet import frechet_distance, gaussian
from learngenes.model.sampling import sample

TASKS = {"animal-mnist": "silhouettes", "mnist": "digits"}
SHOTS = 50
SAMPLES, AT_ONCE, STEPS = 5000, 100, 10
CLASSES = [str(i) for i in range(10)]


def measure() -> Figures:
    with Deployment(profile_seconds=5, verify_seconds=2) as deployment:
        deployment.up()
        figures = {task: _of(task, deployment.client) for task in TASKS}
    first = figures[next(iter(TASKS))]
    return {"tasks": figures, **{f"few_shot_{name}": first[name] for name in first}}


def _of(task: str, client: Client) -> Figures:
    path = REPOSITORY / "var" / "data" / task
    train, test = (labelled.load(path, split, CLASSES, 28) for split in ("train", "test"))
    real = gaussian(test.images)
    few = train.balanced(SHOTS * len(CLASSES))
    created = client.create_task(_archive(few), name=task)
    started_at = time.monotonic()
    model = client.wait(client.create_model(max_mem_gb=4, task=created.id).id)
    seconds = time.monotonic() - started_at
    after = _sampled(client, model.id)
    before = _unretrained(Size(depth=model.plan.depth, rank=model.plan.rank))
    rest = train.subset(torch.arange(len(train)).flip(0)).balanced(SAMPLES)
    return {
        "fd_before": round(frechet_distance(gaussian(before), real), 1),
        "fd_after": round(frechet_distance(gaussian(after), real), 1),
        "fd_of_real_images": round(frechet_distance(gaussian(rest.images), real), 1),
        "fd_of_the_few": round(frechet_distance(gaussian(few.images), real), 1),
        "seconds": round(seconds, 1),
    }


def _unretrained(size: Size) -> torch.Tensor:
    """What the model of a task begins as, which is never served: every class looks alike."""
    family = load_family(FAMILIES / "fashion")
    scales = family.for_task(family.scales_of(size), len(CLASSES))
    model = family.assemble(scales, Mode.MATERIALISED)
    images = [
        sample(
            model,
            family.manifest.diffusion,
            [i % len(CLASSES) for i in range(AT_ONCE)],
            range(start, start + AT_ONCE),
            num_inference_steps=STEPS,
            scheduler=Scheduler.DPMSOLVER,
            guidance_scale=1.0,
        )
        for start in range(0, SAMPLES, AT_ONCE)
    ]
    return torch.cat(images)


def _archive(images: LabelledImages) -> io.BytesIO:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for index, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
            png = encode_png(as_picture(image.numpy()))
            archive.writestr(f"{images.class_names[label]}/{index}.png", png)
    packed.seek(0)
    return packed


def _sampled(client: Client, model: str) -> torch.Tensor:
    """(SAMPLES, 1, 28, 28), as many of each class."""
    images = []
    for start in range(0, SAMPLES, AT_ONCE):
        made = client.generate(
            model,
            class_labels=[i % len(CLASSES) for i in range(AT_ONCE)],
            n=AT_ONCE,
            seed=start,
            num_inference_steps=STEPS,
            scheduler=Scheduler.DPMSOLVER,
            guidance_scale=1.0,
        )
        images.append(torch.from_numpy(pixels(made)))
    return torch.cat(images)[:, None]
