"""Builds whose models are measured in this process, and briefly."""

import dataclasses
from collections.abc import Callable

from learngenes.device import default_device
from learngenes.family.family import load_family
from learngenes.measuring.model import Measurement, measure
from learngenes.model.factors import Own
from worker.build import build as builder
from worker.build.build import Tools
from worker.build.verify import Subject
from worker.runtime import Runtime


def verify_here(subject: Subject, own: Own, on_wait: Callable[[], object]) -> Measurement:
    """`worker.build.verify.verify` without a process of its own, which takes seconds to start."""
    on_wait()
    family = load_family(subject.family).to(default_device())
    model = family.assemble(own.to(default_device()), subject.mode, subject.dtype)
    return measure(model, family.manifest.diffusion, subject.workload, max_seconds=0, least_runs=1)


QUICK = Tools(verify=verify_here)


def build(runtime: Runtime, model_id: str, **tools: object) -> None:
    """Make a queued model ready, with these `Tools` in place of quick ones."""
    builder.build(runtime, model_id, dataclasses.replace(QUICK, **tools))  # type: ignore[arg-type]
