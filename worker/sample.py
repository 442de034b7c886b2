"""The sampling task: images of one request, in batches that the model's budget was stated for."""

import io
import json
import time
from collections import OrderedDict

import structlog
import torch
from PIL import Image

from learngenes.config import Mode
from learngenes.dit import DiT
from learngenes.sampling import sample
from registry.errors import Superseded
from registry.records import GenerationRecord, GenerationStatus, ModelRecord, now
from registry.store import generation_name, image_file
from worker.build import load_scales
from worker.runtime import Runtime, Stopping, describe_error

log = structlog.get_logger()

RESIDENT_MODELS = 8
PROGRESS_SECONDS = 0.5


class ModelGone(Exception):
    """The model was deleted, cancelled or failed after the request was accepted."""


class Sampler:
    """The sampling worker's memory: the models used last."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._resident: OrderedDict[tuple[str, int], DiT] = OrderedDict()

    def generate(self, generation_id: str) -> None:
        """Make the images of a queued generation. Running it twice does no harm."""
        generations = self.runtime.repository.generations
        with self.runtime.lease(generations, generation_id) as record:
            if record is None:
                log.info("nothing to sample", generation=generation_id)
                return
            try:
                self._run(record)
            except Superseded as reason:
                log.info("generation superseded", generation=generation_id, reason=str(reason))
            except Stopping:
                log.info("generation interrupted by shutdown", generation=generation_id)
            except Exception as error:
                log.exception("generation failed", generation=generation_id)
                generations.change(
                    generation_id,
                    attempt=record.attempts,
                    finished_at=now(),
                    **describe_error(error),
                )

    def _run(self, record: GenerationRecord) -> None:
        runtime = self.runtime
        generations = runtime.repository.generations
        model_record = runtime.repository.models.get(record.model)
        revision = model_record.revision
        if revision is None or not model_record.servable:
            raise ModelGone(f"model {record.model} is {model_record.status}")
        record = generations.change(
            record.id, attempt=record.attempts, started_at=now(), revision=revision
        )
        model = self._model(model_record, revision)
        diffusion = runtime.family(model_record.family).manifest.diffusion
        batch = model_record.plan.n
        progress = _Progress(runtime, record, -(-len(record.seeds) // batch))
        pictures: list[bytes] = []
        for start in range(0, len(record.seeds), batch):
            images = sample(
                model,
                diffusion,
                record.class_labels[start : start + batch],
                record.seeds[start : start + batch],
                num_inference_steps=record.num_inference_steps,
                guidance_scale=record.guidance_scale,
                scheduler=record.scheduler,
                on_step=lambda *_: progress.step(),
            )
            pictures += [encode_png(image) for image in images]
        runtime.store.put(
            generation_name(record.id),
            {image_file(i): picture for i, picture in enumerate(pictures)},
            {"record": record.model_dump(mode="json")},
        )
        generations.change(
            record.id, attempt=record.attempts, status=GenerationStatus.DONE, finished_at=now()
        )

    def _model(self, record: ModelRecord, revision: int) -> DiT:
        key = (record.id, revision)
        if key not in self._resident:
            family = self.runtime.family(record.family)
            scales = load_scales(self.runtime.store, family, record.id, revision)
            self._resident[key] = family.assemble(scales, Mode(record.plan.mode))
            if len(self._resident) > RESIDENT_MODELS:
                self._resident.popitem(last=False)
        self._resident.move_to_end(key)
        return self._resident[key]


class _Progress:
    """Between two steps: may stop the sampling, tells how it goes now and then."""

    def __init__(self, runtime: Runtime, record: GenerationRecord, batches: int) -> None:
        self._runtime, self._record = runtime, record
        self._steps = batches * record.num_inference_steps
        self._done = 0
        self._last = time.monotonic()

    def step(self) -> None:
        self._runtime.check_stopping()
        self._done += 1
        if time.monotonic() - self._last < PROGRESS_SECONDS:
            return
        self._last = time.monotonic()
        generations = self._runtime.repository.generations
        current = generations.get(self._record.id)
        if current.finished or current.attempts != self._record.attempts:
            raise Superseded(f"{self._record.id} is {current.status}")
        generations.progress(
            self._record.id, json.dumps({"step": self._done, "steps": self._steps})
        )


def encode_png(image: torch.Tensor) -> bytes:
    """uint8 (C, H, W), one channel or three."""
    array = image.permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()
