"""Builds whose models are measured in this process, and briefly."""

import dataclasses
from collections.abc import Callable

from learngenes.device import default_device
from learngenes.family.family import load_family
from learngenes.measuring.model import Measurement, measure
from learngenes.model.factors import Own
from registry.records import ModelRecord
from worker.build import build as builder
from worker.build.build import Tools
from worker.build.verify import Specimen
from worker.runtime import Runtime


def verify_here(specimen: Specimen, own: Own, on_wait: Callable[[], object]) -> Measurement:
    """`worker.build.verify.verify` without a process of its own, which takes seconds to start."""
    on_wait()
    family = load_family(specimen.family).to(default_device())
    model = family.assemble(own.to(default_device()), specimen.mode, specimen.dtype)
    return measure(model, family.manifest.diffusion, specimen.workload)


QUICK = Tools(verify=verify_here)


def build(runtime: Runtime, model_id: str, **tools: object) -> ModelRecord:
    """Make a queued model ready, with these `Tools` in place of quick ones."""
    builder.build(runtime, model_id, dataclasses.replace(QUICK, **tools))  # type: ignore[arg-type]
    return runtime.repository.models.get(model_id)
