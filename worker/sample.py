"""The sampling task: images of one request, in batches that the model's budget was stated for."""

import io
import itertools
import json
import math
from collections import OrderedDict

import torch
from PIL import Image

from learngenes.config import DType, Mode
from learngenes.dit import DiT
from learngenes.sampling import sample
from registry.errors import ModelGone
from registry.records import GenerationRecord, GenerationStatus, ModelRecord, now
from registry.store import generation_name, image_file
from worker.build import load_scales
from worker.runtime import Reporter, Runtime

RESIDENT_MODELS = 8


class Sampler:
    """The sampling worker's memory: the models used last."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self._resident: OrderedDict[tuple[str, int], DiT] = OrderedDict()

    def generate(self, generation_id: str) -> None:
        """Make the images of a queued generation."""
        self.runtime.attempt(self.runtime.repository.generations, generation_id, self._run)

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
        reporter = Reporter(runtime, generations, record)
        steps = math.ceil(len(record.seeds) / batch) * record.num_inference_steps
        done = itertools.count(1)

        def on_step(*_: int) -> None:
            step = next(done)
            reporter.tell(lambda: json.dumps({"step": step, "steps": steps}))

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
                on_step=on_step,
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
            self._resident[key] = family.assemble(
                scales, Mode(record.plan.mode), DType(record.plan.dtype)
            )
            for old in [k for k in self._resident if k[0] == record.id and k != key]:
                del self._resident[old]
            if len(self._resident) > RESIDENT_MODELS:
                self._resident.popitem(last=False)
        self._resident.move_to_end(key)
        return self._resident[key]


def encode_png(image: torch.Tensor) -> bytes:
    """uint8 (C, H, W), one channel or three."""
    array = image.permute(1, 2, 0).squeeze(-1).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="PNG")
    return buffer.getvalue()
