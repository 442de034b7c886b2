"""What the four servers share: settings, the pipelines of all models, and a list of requests."""

import io
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import torch
from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, PositiveInt
from torch import Tensor, nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WARM_UP_STEPS = 2


class Settings(BaseModel):
    """Read from `PEER_*` variables, named as the fields are."""

    models: Path
    """One sub-directory per model, as `learngenes.formats.diffusers` writes them."""
    port: int
    dtype: str = "float32"
    compile: bool = False
    threads: PositiveInt = 2
    max_batch_size: PositiveInt = 16
    batch_timeout: float = 0.1
    """Seconds that a batch waits for more requests; a full one goes at once. Worth a sweep for each
    server: single short runs on a busy machine favoured 0.1 over 0.02 for Ray Serve only."""

    @classmethod
    def read(cls) -> "Settings":
        names = {f"PEER_{field.upper()}": field for field in cls.model_fields}
        return cls.model_validate(
            {field: os.environ[name] for name, field in names.items() if name in os.environ}
        )


class Request(BaseModel):
    """Body of `POST /generate`: one image."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model: str
    class_label: int = Field(ge=0, lt=1000)
    num_inference_steps: int = Field(default=25, ge=1, le=1000)
    guidance_scale: float = 2.0
    seed: int = Field(default=0, ge=0)

    @property
    def key(self) -> tuple[str, int, float]:
        """Requests of one key fit into one pipeline call."""
        return self.model, self.num_inference_steps, self.guidance_scale


class PixelSpace(nn.Module):
    """Stand-in for the VAE: these models denoise pixels, so there is nothing to decode."""

    config = SimpleNamespace(scaling_factor=1)
    device = torch.device("cpu")  # a pipeline asks its first module

    def decode(self, latents: Tensor) -> SimpleNamespace:
        return SimpleNamespace(sample=latents)


class Pipelines:
    """Every model, loaded and warm.

    One thread loads, compiles and samples, whatever thread asks. On two cores, a model warmed in
    the main thread and then called in another ran at half its speed, one core busy. Probably
    because GNU OpenMP keeps a team for each thread that computes, and lets them spin less once
    they have more members than there are cores.
    """

    def __init__(self, settings: Settings) -> None:
        self._thread = ThreadPoolExecutor(1)
        self._by_name: dict[str, DiTPipeline] = {}
        self._thread.submit(self._load, settings).result()

    def generate(self, requests: Sequence[Request]) -> list[bytes]:
        """One PNG per request, in their order. Requests of one key are sampled together."""
        return self.submit(requests).result()

    def submit(self, requests: Sequence[Request]) -> Future[list[bytes]]:
        return self._thread.submit(self._generate, requests)

    def _load(self, settings: Settings) -> None:
        torch.set_num_threads(settings.threads)
        torch._dynamo.config.recompile_limit = 64  # one forward is compiled for every model
        directories = sorted(path for path in settings.models.iterdir() if path.is_dir())
        self._by_name = {path.name: load_pipeline(path, settings) for path in directories}
        for name in self._by_name:
            self._warm_up(name, settings.max_batch_size)

    def _generate(self, requests: Sequence[Request]) -> list[bytes]:
        groups: defaultdict[tuple[str, int, float], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[request.key].append(index)
        images: dict[int, bytes] = {}
        for indices in groups.values():
            pngs = self._generate_group([requests[index] for index in indices])
            images |= dict(zip(indices, pngs, strict=True))
        return [images[index] for index in range(len(requests))]

    @torch.inference_mode()
    def _generate_group(self, requests: Sequence[Request]) -> list[bytes]:
        model, num_inference_steps, guidance_scale = requests[0].key
        pictures = self._by_name[model](
            class_labels=[request.class_label for request in requests],
            generator=[torch.Generator().manual_seed(request.seed) for request in requests],
            num_inference_steps=num_inference_steps,
            guidance_scale=guidance_scale,
        ).images
        return [png(picture) for picture in pictures]

    def _warm_up(self, name: str, max_batch_size: int) -> None:
        """Compiles, and lets oneDNN choose its kernels, for a lone request and for batches."""
        for count in sorted({1, 2, max_batch_size}):
            request = Request(model=name, class_label=0, num_inference_steps=WARM_UP_STEPS)
            self._generate([request] * count)
        sys.stderr.write(f"{name} is warm on {torch.get_num_threads()} threads\n")


def load_pipeline(directory: Path, settings: Settings) -> DiTPipeline:
    transformer = DiTTransformer2DModel.from_pretrained(
        directory / "transformer", torch_dtype=DTYPES[settings.dtype]
    )
    scheduler = DDIMScheduler.from_pretrained(directory / "scheduler")
    pipeline = DiTPipeline(transformer=transformer.eval(), vae=PixelSpace(), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    if settings.compile:  # batches have any number of rows
        pipeline.transformer.compile(dynamic=True)
    return pipeline


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()
