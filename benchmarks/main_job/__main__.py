"""The main job, from a fresh clone to images: `make bench-main-job`.

Writes benchmarks/results/main_job.json, whose `summary` the README shows, and the picture.
"""

import json
import os
import platform
import re
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.classifier import accuracy, train_classifier
from benchmarks.deployment import REPOSITORY, Deployment
from learngenes.config import Mode, Scheduler, Size
from learngenes.data.labelled import LabelledImages, load
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import to_diffusers
from learngenes.model.diffusion import diffusers_scheduler
from learngenes.model.sampling import initial_noise
from learngenes.model.sigma import interpolated

RESULTS = REPOSITORY / "benchmarks" / "results"
FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STEPS = 20
PER_CLASS = 100
Figures = dict[str, Any]


def say(**figures: Any) -> Figures:
    for name, value in figures.items():
        sys.stdout.write(f"  {name}: {value}\n")
    sys.stdout.flush()
    return figures


def first_model(deployment: Deployment) -> tuple[str, Figures]:
    """Check 1: first image from revision 0, and ready, in seconds after the POST."""
    started = time.perf_counter()
    model_id = deployment.model(4)
    deployment.wait_model(model_id, lambda m: m["revision"] is not None)
    request = {"class_labels": ["Sneaker"], "n": 1, "num_inference_steps": STEPS}
    answer = deployment.http.post("/generate", json={"model": model_id, **request}).json()
    first_image = time.perf_counter() - started
    ready = deployment.wait_model(model_id, lambda m: m["status"] == "ready")
    return model_id, say(
        first_image_seconds=round(first_image, 2),
        first_image_revision=answer["revision"],
        ready_seconds=round(time.perf_counter() - started, 1),
        predicted=ready["plan"]["predicted"],
        measured=ready["measured"],
    )


def three_sizes(deployment: Deployment) -> Figures:
    """Check 2: three budgets, three sizes, one worker; bytes and batch independence.

    Sampled from revision 0, well before retraining replaces it.
    """
    sizes, difference, same = [], 0, True
    for max_mem_gb in (0.004, 0.006, 4):
        model_id = deployment.model(max_mem_gb)
        plan = deployment.wait_model(model_id, lambda m: m["revision"] is not None)["plan"]
        sizes.append(f"L{plan['depth']} r{plan['rank']} {plan['mode']}")
        request: Figures = {"num_inference_steps": STEPS, "seed": 1}
        batch = deployment.images(model_id, class_labels=[7], n=8, **request)
        again = deployment.images(model_id, class_labels=[7], n=8, **request)
        alone = deployment.images(model_id, class_labels=[7], n=1, **request)
        same = same and bool((batch == again).all())
        difference = max(difference, int(np.abs(batch[0].astype(int) - alone[0]).max()))
        deployment.http.post(f"/models/{model_id}/cancel")
    return say(sizes=sizes, same_bytes=same, max_pixel_difference=difference)


def class_accuracy(deployment: Deployment, model_id: str, real: LabelledImages) -> Figures:
    """Check 3: a classifier of the real data looks for the requested classes."""
    classes = len(real.class_names)
    images = np.concatenate(
        [
            deployment.images(
                model_id,
                class_labels=[label],
                n=PER_CLASS,
                num_inference_steps=STEPS,
                seed=label * PER_CLASS,
            )
            for label in range(classes)
        ]
    )
    save_grid(images.reshape(classes, PER_CLASS, *images.shape[1:])[:, :20])
    labels = torch.arange(classes).repeat_interleave(PER_CLASS)
    sampled = LabelledImages(torch.from_numpy(images)[:, None], labels, real.class_names)
    judge = train_classifier(real)
    test = load(FASHION_MNIST, "test", real.class_names, 28)
    by_class = {
        name: accuracy(judge, sampled.subset(torch.nonzero(labels == i).flatten()))
        for i, name in enumerate(real.class_names)
    }
    return say(
        class_accuracy=accuracy(judge, sampled),
        class_accuracy_real_test_set=accuracy(judge, test),
        class_accuracy_by_class=by_class,
    )


def save_grid(images: np.ndarray) -> None:
    """(rows, columns, H, W) as one picture, twice its size."""
    rows = np.concatenate(list(np.concatenate(list(images.transpose(1, 0, 2, 3)), axis=2)), axis=0)
    picture = Image.fromarray(rows)
    picture = picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)
    picture.save(RESULTS / "main_job.png", optimize=True)


def against_diffusers(family: Family) -> Figures:
    """Check 4: the network beside diffusers' own, with the family's weights, at three sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 28, 28, generator=generator)
    timesteps = torch.linspace(0, 999, 8).long()
    labels = torch.arange(8)
    differences = {}
    for size in (Size(depth=2, rank=32), Size(depth=5, rank=128), family.full_size):
        model = family.assemble(interpolated(family.scales, size), Mode.MATERIALISED)
        with torch.no_grad():
            theirs = to_diffusers(model)(x, timestep=timesteps, class_labels=labels).sample
            difference = (model(x, timesteps, labels) - theirs).abs().max().item()
        differences[f"L{size.depth} r{size.rank}"] = difference
    return say(diffusers_max_abs_diff=max(differences.values()), diffusers_differences=differences)


@torch.inference_mode()
def diffusers_seconds(family: Family, n: int) -> float:
    """One guided request of `n` images with diffusers' network and scheduler, no service."""
    model = family.assemble(family.scales, Mode.MATERIALISED)
    network = to_diffusers(model)
    labels = torch.tensor([7] * n + [10] * n)
    started = time.perf_counter()
    schedule = diffusers_scheduler(family.manifest.diffusion, Scheduler.DDIM, STEPS)
    x = initial_noise(model.config, range(n))
    for t in schedule.timesteps:
        rows = torch.cat([x, x])
        prediction = network(rows, timestep=t.expand(2 * n), class_labels=labels).sample
        conditional, unconditional = prediction.chunk(2)
        x = schedule.step(unconditional + 2 * (conditional - unconditional), t, x).prev_sample
    return time.perf_counter() - started


def against_plain_diffusers(deployment: Deployment, model_id: str, family: Family) -> Figures:
    """One request over HTTP beside the same images by diffusers alone; medians of five."""
    n = 4
    ours, theirs = [], []
    for _ in range(5):
        started = time.perf_counter()
        deployment.images(model_id, class_labels=[7], n=n, num_inference_steps=STEPS, seed=0)
        ours.append(time.perf_counter() - started)
        theirs.append(diffusers_seconds(family, n))
    ratio = float(np.median(ours) / np.median(theirs))
    return say(request_seconds_over_plain_diffusers=round(ratio, 2))


def kill_the_build_worker(deployment: Deployment) -> tuple[str, float]:
    """Check 5: SIGKILL in the middle of Sigma retraining; the model, and when it was."""
    model_id = deployment.model(4)
    deployment.wait_model(model_id, lambda m: m["status"] == "retraining")
    time.sleep(5)
    for pid in deployment.pids("-m worker build"):
        os.kill(pid, signal.SIGKILL)
    return model_id, time.time()


def after_the_kill(deployment: Deployment, model_id: str, killed_at: float) -> Figures:
    """The model is ready, once."""
    ready = deployment.wait_model(model_id, lambda m: m["status"] == "ready")
    seconds = datetime.fromisoformat(ready["ready_at"]).timestamp() - killed_at
    events = deployment.http.get(f"/models/{model_id}/events").text
    return say(
        ready_after_kill_seconds=round(seconds, 1),
        ready_events=events.count('"status":"ready"'),
        attempts=max(int(found) for found in re.findall(r'"attempts":(\d+)', events)),
    )


def run_tests(deployment: Deployment) -> Figures:
    """Check 6: `make test` in the clone."""
    seconds = deployment.make("test")
    report = json.loads((deployment.path / "coverage.json").read_text())
    return say(test_seconds=round(seconds), coverage=round(report["totals"]["percent_covered"], 1))


def save(figures: Figures, family: Family) -> None:
    """Write what is known so far."""
    names = (
        *("up_seconds", "first_image_seconds", "ready_seconds", "class_accuracy"),
        *("diffusers_max_abs_diff", "coverage", "test_seconds"),
    )
    result = {
        "summary": {name: figures.get(name) for name in names},
        "figures": figures,
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "torch": torch.__version__,
            "isa": torch.backends.cpu.get_cpu_capability(),
        },
        "family_trained_steps": family.manifest.trained_steps,
    }
    (RESULTS / "main_job.json").write_text(json.dumps(result, indent=2) + "\n")


def main() -> None:
    RESULTS.mkdir(exist_ok=True)
    family = load_family(REPOSITORY / "families" / "fashion")
    real = load(FASHION_MNIST, "train", family.manifest.class_names, 28)
    deployment = Deployment()
    try:
        measure_all(deployment, family, real)
    finally:
        deployment.make("down")
        deployment.remove()


def measure_all(deployment: Deployment, family: Family, real: LabelledImages) -> None:
    figures: Figures = say(up_seconds=round(deployment.make("up"), 1))
    model_id, timings = first_model(deployment)
    figures |= timings
    figures |= three_sizes(deployment)
    figures |= against_diffusers(family)
    figures |= against_plain_diffusers(deployment, model_id, family)
    save(figures, family)
    killed = kill_the_build_worker(deployment)
    figures |= class_accuracy(deployment, model_id, real)
    figures |= after_the_kill(deployment, *killed)
    deployment.make("down")
    figures |= say(processes_after_down=len(deployment.pids()))
    save(figures, family)
    figures |= run_tests(deployment)
    save(figures, family)


if __name__ == "__main__":
    main()
