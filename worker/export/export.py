"""The export task: it writes the revision that is served now for use elsewhere."""

import io
import tarfile
import tempfile
from pathlib import Path

import structlog
from pydantic_core import to_json
from redis.exceptions import RedisError

from fineserve.wire import ExportFormat
from learngenes.family.family import Family
from learngenes.formats.diffusers import PIPELINE_NULL_CLASS, export_model
from learngenes.formats.native import save_model
from learngenes.formats.onnx import export_in_process
from learngenes.model.factors import Own
from learngenes.model.frozen import as_served
from learngenes.model.schedulers import diffusers_scheduler
from registry.errors import StorageFull
from registry.records import ModelRecord
from registry.repository import Reason
from registry.store import EXPORT_FILE, export_name, served_name
from worker.artifacts import load_own
from worker.leases import Stopping
from worker.runtime import Runtime

log = structlog.get_logger()

FAILURE_SECONDS = 10.0
"""Seconds for which everybody who waits is told of a failure; then it is tried again."""

CARD = """---
library_name: {library}
pipeline_tag: unconditional-image-generation
tags: [fineserve, FINE, {record.family}]
license: other
---

# {record.name}

A diffusion transformer that fineserve sized for a budget. {usage}

| | |
|---|---|
| family | {record.family} (learngenes {fingerprint:.12}), trained for {trained_steps} steps{seed} |
| model | {record.id}, revision {record.revision} |
| size | depth {plan.depth}, rank {plan.rank}; served as {plan.mode}, {plan.dtype} |
| budget | {budget} |
| measured when served | {measured} |
| sampling | {sampling} |
| image | {channels} x {pixels} x {pixels}, values from -1 to 1 |
| classes | {classes}; {null_class} is the null class |

Method: FINE (arXiv 2409.19289). {licence}
"""


DIFFUSERS_USAGE = """Its weights are written out in float32, and sampled from as it was planned:

    from diffusers import {scheduler}, DiTTransformer2DModel

    transformer = DiTTransformer2DModel.from_pretrained(".", subfolder="transformer"){load_guide}
    scheduler = {scheduler}.from_pretrained(".", subfolder="scheduler")
    scheduler.set_timesteps({steps})
    for step, t in enumerate(scheduler.timesteps):
        scaled, times = scheduler.scale_model_input(x, t), t.expand(len(x))
        prediction = transformer(scaled, times, labels).sample
        if step in range({start}, {stop}):  # guided
            other = {guide}(scaled, times, {guide_labels}).sample
            prediction = other + {scale:g} * (prediction - other)
        x = scheduler.step(prediction, t, x).prev_sample

`DiTPipeline` guides by the class in every step, and by no smaller model."""
LOAD_GUIDE = """
    guide = DiTTransformer2DModel.from_pretrained(".", subfolder="guide")"""
ONNX_USAGE = """Its weights are written out in float32; the loop over the scheduler's
timesteps is the caller's:

    session = onnxruntime.InferenceSession("model.onnx")
    (prediction,) = session.run(
        None, {"sample": x, "timestep": timesteps, "class_labels": labels}
    )  # float32 (N, C, H, W), int64 (N,), int64 (N,) -> float32 (N, C, H, W)"""
NATIVE_USAGE = """It holds all that is its own, the stem, and U and V of its rank if it has factors:

    from pathlib import Path

    from learngenes.model.sampling import sample
    from learngenes.formats.native import load_model

    model = load_model(Path("."))
    images = sample(model.network, model.manifest.diffusion, class_labels=[0], seeds=[0])"""
ADAPTER_USAGE = """It holds what is its own alone, and needs its family beside it:

    from pathlib import Path

    from learngenes.family.family import load_family
    from learngenes.model.sampling import sample
    from learngenes.formats.native import load_model

    model = load_model(Path("."), load_family(Path("families/NAME")))
    images = sample(model.network, model.manifest.diffusion, class_labels=[0], seeds=[0])"""
LATENTS_USAGE = {
    ExportFormat.DIFFUSERS: """

It denoises latents, `vae/` makes images of them: `DiTPipeline.from_pretrained(".")` does both.""",
    ExportFormat.ONNX: """

It denoises latents, and `decoder.onnx` makes images of them, of `latents` `images`.""",
}
USAGES = {
    ExportFormat.DIFFUSERS: ("diffusers", DIFFUSERS_USAGE),
    ExportFormat.ONNX: ("onnx", ONNX_USAGE),
    ExportFormat.NATIVE: ("fineserve", NATIVE_USAGE),
    ExportFormat.ADAPTER: ("fineserve", ADAPTER_USAGE),
}
"""Library as Hugging Face's model cards name it, and text on how to load the model."""


def export(runtime: Runtime, model_id: str, form: ExportFormat) -> None:
    """Write the tar that `GET /models/{id}/export` waits for; it stays for a day.

    A model that is gone leaves nothing: who waits is told by its record. Any other failure is told,
    and what is interrupted is asked for again by who waits: there may be a message too many.
    """
    record = runtime.repository.models.get(model_id)
    if not record.servable:
        log.info("nothing to export", model=model_id, status=record.status)
        return
    try:
        with runtime.leases.first(export_name(record, form)) as first:
            if first:
                with runtime.leases.alone("export"):  # each takes twice its model's float32 memory
                    _export(runtime, record, form)
    except (Stopping, RedisError):
        raise
    except Exception as error:
        log.exception("export failed", model=model_id, form=form)
        name = export_name(record, form)
        problem = "storage-full" if isinstance(error, StorageFull) else None
        reason = Reason(f"{type(error).__name__}: {error}", problem)
        runtime.repository.fail_once(name, reason, FAILURE_SECONDS)


def _export(runtime: Runtime, record: ModelRecord, form: ExportFormat) -> None:
    name = export_name(record, form)
    if runtime.store.has(name, EXPORT_FILE):
        return
    family = runtime.family(record.family)
    own = load_own(runtime.store, family, served_name(record))
    with tempfile.TemporaryDirectory(prefix="fineserve-export-") as temporary:
        directory = Path(temporary)
        _write(form, directory, record, family, own)
        (directory / "README.md").write_text(model_card(record, family, form))
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as tar:
            tar.add(directory, arcname=record.id, filter=_for_everybody)
    runtime.store.put(name, {EXPORT_FILE: packed.getvalue()}, {"revision": record.revision})


def _for_everybody(member: tarfile.TarInfo) -> tarfile.TarInfo:
    """A file that whoever unpacks it may read, and that does not tell who packed it."""
    member.mode = 0o755 if member.isdir() else 0o644
    member.uid = member.gid = 0
    member.uname = member.gname = ""
    return member


def _write(
    form: ExportFormat, directory: Path, record: ModelRecord, family: Family, own: Own
) -> None:
    if form in (ExportFormat.DIFFUSERS, ExportFormat.ONNX):  # in float32, bits unpacked
        own = as_served(family.genes, own, record.plan.mode, record.plan.dtype)
    if form is ExportFormat.DIFFUSERS:
        plan, size = record.plan, record.plan.workload.sampling.guide
        guide = None
        if size is not None:
            begun = family.own_of(size, plan.mode, plan.dtype)
            guide = as_served(family.genes, begun, plan.mode, plan.dtype)
        export_model(family, own, directory, record.class_names or (), guide)
    elif form is ExportFormat.ONNX:
        export_in_process(family, own, directory)
    else:
        save_model(
            directory,
            family,
            own,
            record.plan.mode,
            record.plan.dtype,
            record.class_names or family.manifest.class_names,
            whole=form is ExportFormat.NATIVE,
        )


def model_card(record: ModelRecord, family: Family, form: ExportFormat) -> str:
    """Model card of an exported directory."""
    manifest = family.manifest
    class_names = record.class_names or manifest.class_names
    library, usage = USAGES[form]
    sampling = record.plan.workload.sampling
    if form is ExportFormat.DIFFUSERS:
        usage = usage.format(
            scheduler=type(diffusers_scheduler(manifest.diffusion, sampling.scheduler, 1)).__name__,
            steps=sampling.num_inference_steps,
            start=sampling.guided.start,
            stop=sampling.guided.stop,
            scale=sampling.guidance_scale,
            load_guide=LOAD_GUIDE if sampling.guide else "",
            guide="guide" if sampling.guide else "transformer",
            guide_labels="labels" if sampling.guide else f"0 * labels + {PIPELINE_NULL_CLASS}",
        )
    if manifest.network.autoencoder is not None:
        usage += LATENTS_USAGE.get(form, "")
    seed = "" if manifest.seed is None else f", seed {manifest.seed}"
    null_class = PIPELINE_NULL_CLASS if form is ExportFormat.DIFFUSERS else len(class_names)
    classes = ", ".join(f"{number} {name}" for number, name in enumerate(class_names))
    return CARD.format(
        library=library,
        usage=usage,
        sampling=sampling.model_dump_json(exclude_none=True),
        seed=seed,
        null_class=null_class,
        record=record,
        plan=record.plan,
        trained_steps=manifest.trained_steps,
        channels=manifest.network.image_channels,
        pixels=manifest.network.image_size,
        licence=manifest.licence,
        fingerprint=family.fingerprint,
        budget=record.budget.model_dump_json(exclude_none=True),
        measured=to_json(record.measured).decode() if record.measured else "not yet",
        classes=classes,
    )
