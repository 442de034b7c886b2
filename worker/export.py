"""The export task: the revision of a model that is served now, for plain diffusers."""

import io
import tarfile
import tempfile
from pathlib import Path

import structlog

from learngenes.export import export_model
from learngenes.family import Family
from registry.records import ModelRecord
from registry.store import EXPORT_FILE, export_name
from worker.build import load_own
from worker.runtime import Runtime

log = structlog.get_logger()

CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags: [fineserve, FINE, {family}]
license: other
---

# {name}

A diffusion transformer that fineserve sized for a budget, weights written out in float32.

    from diffusers import DDIMScheduler, DiTTransformer2DModel

    transformer = DiTTransformer2DModel.from_pretrained(".", subfolder="transformer")
    scheduler = DDIMScheduler.from_pretrained(".", subfolder="scheduler")

| | |
|---|---|
| family | {family} (learngenes {fingerprint}), trained for {trained_steps} steps |
| model | {id}, revision {revision} |
| size | depth {depth}, rank {rank}; served as {mode}, {dtype} |
| budget | {budget} |
| measured when served | {measured} |
| image | {channels} x {pixels} x {pixels}, values from -1 to 1 |
| classes | {classes}; 1000 is the null class, as in diffusers' `DiTPipeline` |

Method: FINE (arXiv 2409.19289). {licence}
"""


def export(runtime: Runtime, model_id: str) -> None:
    """Write the tar that `GET /models/{id}/export` waits for; it stays for a day.

    A model that is gone, or cannot be read, leaves nothing: who waits is told by its record.
    """
    record = runtime.repository.models.get(model_id)
    if record.revision is None or not record.servable:
        log.info("nothing to export", model=model_id, status=record.status)
        return
    with runtime.alone("export"):  # each takes as much memory as its model in float32, twice
        _export(runtime, record, record.revision)


def _export(runtime: Runtime, record: ModelRecord, revision: int) -> None:
    name = export_name(record.id, revision)
    if runtime.store.path(name, EXPORT_FILE) is not None:
        return
    family = runtime.family(record.family)
    own = load_own(runtime.store, family, record.id, revision)
    with tempfile.TemporaryDirectory(prefix="fineserve-export-") as temporary:
        directory = Path(temporary)
        export_model(family, own, directory)
        (directory / "README.md").write_text(model_card(record, family))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(directory, arcname=record.id)
    runtime.store.put(name, {EXPORT_FILE: packed.getvalue()}, {"revision": revision})


def model_card(record: ModelRecord, family: Family) -> str:
    """What the exported directory says of itself."""
    manifest, plan, measured = family.manifest, record.plan, record.measured
    class_names = record.class_names or manifest.class_names
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(class_names))
    return CARD.format(
        family=record.family,
        name=record.name,
        fingerprint=family.fingerprint[:12],
        trained_steps=manifest.trained_steps,
        id=record.id,
        revision=record.revision,
        depth=plan.depth,
        rank=plan.rank,
        mode=plan.mode,
        dtype=plan.dtype,
        budget=record.budget.model_dump_json(exclude_none=True),
        measured=measured.model_dump_json() if measured else "not yet",
        channels=manifest.network.in_channels,
        pixels=manifest.network.sample_size,
        classes=classes,
        licence=manifest.licence,
    )
