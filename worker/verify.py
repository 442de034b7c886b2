"""A model measured in a process of its own: `python -m worker verify`, JSON in and out.

The process imports what a sampling worker imports and loads the model's family alone, so that
its largest resident set is what serving this one model takes.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pydantic import BaseModel, TypeAdapter
from safetensors.torch import load_file, save_file

from learngenes.config import DType, Mode, Size
from learngenes.device import default_device
from learngenes.factors import Scales
from learngenes.family import load_family
from learngenes.measure import Measurement, measure
from learngenes.sigma import interpolated
from learngenes.sizing.cost import Workload

POLL_SECONDS = 0.2


class VerificationError(RuntimeError):
    """The measuring process died; the message has its last words."""


class Request(BaseModel):
    family: Path
    """The family's directory."""
    depth: int
    rank: int
    mode: Mode
    dtype: DType
    workload: Workload
    max_seconds: float = 30.0
    scales: Path | None = None
    """The model's own, in a safetensors file; by default interpolated from the family's."""


def verify(
    request: Request, scales: Scales | None = None, on_wait: Callable[[], None] = lambda: None
) -> Measurement:
    """Measure in a fresh process. `on_wait` is called now and then and may raise to stop.

    Raises VerificationError when the process dies, as it does when memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="fineserve-") as directory:
        if scales is not None:
            request = request.model_copy(update={"scales": Path(directory) / "scales.safetensors"})
            tensors = {name: tensor.cpu() for name, tensor in scales.stacked().items()}
            save_file(tensors, str(request.scales))
        with (
            (Path(directory) / "errors").open("w+") as errors,
            subprocess.Popen(
                [sys.executable, "-m", "worker", "verify"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
            ) as process,
        ):
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request.model_dump_json())
                process.stdin.close()
                while process.poll() is None:
                    on_wait()
                    time.sleep(POLL_SECONDS)
            except BaseException:
                process.kill()
                raise
            if process.returncode:
                errors.seek(0)
                raise VerificationError(
                    f"measuring ended with status {process.returncode}: {errors.read()[-500:]}"
                )
            return TypeAdapter(Measurement).validate_json(process.stdout.read())


def main() -> None:
    request = Request.model_validate_json(sys.stdin.read())
    family = load_family(request.family).to(default_device())
    if request.scales is not None:
        scales = Scales.from_stacked(load_file(request.scales)).to(default_device())
    else:
        scales = interpolated(family.scales, Size(depth=request.depth, rank=request.rank))
    model = family.assemble(scales, request.mode, request.dtype)
    measurement = measure(model, family.manifest.diffusion, request.workload, request.max_seconds)
    sys.stdout.write(json.dumps(asdict(measurement)) + "\n")
