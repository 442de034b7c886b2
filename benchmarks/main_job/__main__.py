"""The main job, from a fresh clone to images: `make bench-main-job`.

Writes benchmarks/results/main_job.json, whose `summary` the README shows, and the picture.
"""

import json
import os
import platform
import signal
import time
from pathlib import Path

import numpy as np
import torch

from benchmarks.deployment import FAMILIES, FreshClone, pixels
from benchmarks.parts import RESULTS, Figures, origin_now, say
from learngenes.config import Mode, Scheduler, Size
from learngenes.data.images import grid
from learngenes.data.labelled import LabelledImages, load
from learngenes.family.family import Family, load_family
from learngenes.formats.diffusers import to_diffusers
from learngenes.judging.classifier import accuracy, train_classifier
from learngenes.model.sampling import initial_noise
from learngenes.model.schedulers import diffusers_scheduler

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
STEPS = 20
PER_CLASS = 100


def first_model(clone: FreshClone) -> tuple[str, Figures]:
    """Check 1: first image from revision 0, and ready, in seconds after the POST."""
    started = time.perf_counter()
    model_id = clone.client.create_model(max_mem_gb=4).id
    clone.wait_model(model_id, lambda model: model.revision is not None)
    clone.client.generate(model_id, class_labels=["Sneaker"], num_inference_steps=STEPS)
    first_image = time.perf_counter() - started
    revision = clone.client.model(model_id).revision  # or an earlier one
    ready = clone.client.wait(model_id).model_dump(mode="json")
    return model_id, {
        "first_image_seconds": round(first_image, 2),
        "first_image_revision": revision,
        "ready_seconds": round(time.perf_counter() - started, 1),
        "predicted": ready["plan"]["predicted"],
        "measured": ready["measured"],
    }


def three_sizes(clone: FreshClone) -> Figures:
    """Check 2: three budgets, three sizes, one worker; bytes and batch independence.

    Sampled from revision 0, well before retraining replaces it.
    """
    sizes, difference, same = [], 0, True
    for max_mem_gb in (0.004, 0.006, 4):
        model_id = clone.client.create_model(max_mem_gb=max_mem_gb).id
        plan = clone.wait_model(model_id, lambda model: model.revision is not None).plan
        sizes.append(f"L{plan.depth} r{plan.rank} {plan.mode}")
        batch, again, alone = (images(clone, model_id, label=7, n=n, seed=1) for n in (8, 8, 1))
        same = same and bool((batch == again).all())
        difference = max(difference, int(np.abs(batch[0].astype(int) - alone[0]).max()))
        clone.client.cancel_model(model_id)
    return {"sizes": sizes, "same_bytes": same, "max_pixel_difference": difference}


def images(clone: FreshClone, model_id: str, *, label: int, n: int, seed: int) -> np.ndarray:
    """uint8 (N, H, W)."""
    made = clone.client.generate(
        model_id, class_labels=[label], n=n, num_inference_steps=STEPS, seed=seed
    )
    return pixels(made)


def class_accuracy(clone: FreshClone, model_id: str, real: LabelledImages) -> Figures:
    """Check 3: a classifier of the real data looks for the requested classes."""
    classes = len(real.class_names)
    made = np.stack(
        [
            images(clone, model_id, label=label, n=PER_CLASS, seed=label * PER_CLASS)
            for label in range(classes)
        ]
    )
    grid(made[:, :20, None], scale=2).save(RESULTS / "main_job.png", optimize=True)
    labels = torch.arange(classes).repeat_interleave(PER_CLASS)
    grey = torch.from_numpy(made).flatten(0, 1)[:, None]
    sampled = LabelledImages(grey, labels, real.class_names)
    judge = train_classifier(real)
    test = load(FASHION_MNIST, "test", real.class_names, 28)
    by_class = {
        name: accuracy(judge, sampled.subset(torch.nonzero(labels == i).flatten()))
        for i, name in enumerate(real.class_names)
    }
    return {
        "class_accuracy": accuracy(judge, sampled),
        "class_accuracy_real_test_set": accuracy(judge, test),
        "class_accuracy_by_class": by_class,
    }


def against_diffusers(family: Family) -> Figures:
    """Check 4: the network beside diffusers' own, with the family's weights, at three sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 1, 28, 28, generator=generator)
    timesteps = torch.linspace(0, 999, 8).long()
    labels = torch.arange(8)
    differences = {}
    rank = family.full_size.rank
    for size in (Size(depth=2, rank=rank), Size(depth=5, rank=rank), family.full_size):
        model = family.assemble(family.scales_of(size), Mode.MATERIALISED)
        with torch.no_grad():
            theirs = to_diffusers(model)(x, timestep=timesteps, class_labels=labels).sample
            difference = (model(x, timesteps, labels) - theirs).abs().max().item()
        differences[f"L{size.depth} r{size.rank}"] = difference
    largest = max(differences.values())
    return {"diffusers_max_abs_diff": largest, "diffusers_differences": differences}


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


def against_plain_diffusers(clone: FreshClone, model_id: str, family: Family) -> Figures:
    """One request over HTTP beside the same images by diffusers alone; medians of five."""
    n = 4
    ours, theirs = [], []
    for _ in range(5):
        started = time.perf_counter()
        images(clone, model_id, label=7, n=n, seed=0)
        ours.append(time.perf_counter() - started)
        theirs.append(diffusers_seconds(family, n))
    ratio = float(np.median(ours) / np.median(theirs))
    return {"request_seconds_over_plain_diffusers": round(ratio, 2)}


def kill_the_build_worker(clone: FreshClone) -> tuple[str, float]:
    """Check 5: SIGKILL in the middle of Sigma retraining; the model, and when it was."""
    model_id = clone.client.create_model(max_mem_gb=4).id
    clone.wait_model(model_id, lambda model: model.status == "retraining")
    time.sleep(5)
    for pid in clone.pids("-m worker build"):
        os.kill(pid, signal.SIGKILL)
    return model_id, time.time()


def after_the_kill(clone: FreshClone, model_id: str, killed_at: float) -> Figures:
    """The model is ready, once."""
    ready = clone.client.wait(model_id)
    assert ready.ready_at is not None
    events = [json.loads(event) for event in clone.events(model_id)]
    return {
        "ready_after_kill_seconds": round(ready.ready_at.timestamp() - killed_at, 1),
        "ready_events": sum(event.get("status") == "ready" for event in events),
        "attempts": max(event.get("attempts", 0) for event in events),
    }


def run_tests(clone: FreshClone) -> Figures:
    """Check 6: `make test` in the clone."""
    seconds = clone.make("test")
    report = json.loads((clone.root / "coverage.json").read_text())
    coverage = round(report["totals"]["percent_covered"], 1)
    return {"test_seconds": round(seconds), "coverage": coverage}


def save(figures: Figures, family: Family, origin: Figures) -> None:
    """Write what is known so far."""
    names = (
        *("up_seconds", "first_image_seconds", "ready_seconds", "class_accuracy"),
        *("diffusers_max_abs_diff", "coverage", "test_seconds"),
    )
    result = {
        "summary": {name: figures.get(name) for name in names},
        "figures": figures,
        "origin": origin,
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
    family = load_family(FAMILIES / "fashion")
    real = load(FASHION_MNIST, "train", family.manifest.class_names, 28)
    figures: Figures = {}
    origin = origin_now()

    def told(new: Figures) -> None:
        for name, value in new.items():
            say(f"{name}: {value}")
        figures.update(new)
        save(figures, family, origin)

    with FreshClone() as clone:
        told({"up_seconds": round(clone.make("up"), 1)})
        model_id, timings = first_model(clone)
        told(timings)
        told(three_sizes(clone))
        told(against_diffusers(family))
        told(against_plain_diffusers(clone, model_id, family))
        killed = kill_the_build_worker(clone)
        told(class_accuracy(clone, model_id, real))
        told(after_the_kill(clone, *killed))
        clone.make("down")
        told({"processes_after_down": len(clone.pids())})
        told(run_tests(clone))


if __name__ == "__main__":
    main()
