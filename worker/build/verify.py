"""Verification: a model measured in a process of its own (`python -m worker verify`).

The process imports what a sampling worker imports and loads the model's family alone, so that
its largest resident set is what serving this one model takes. Its seconds are those of its own
uncompiled batches; what a caller waits for is measured by `worker.build.stopwatch`.
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from pydantic import BaseModel, TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from learngenes.config import DType, Mode, Size
from learngenes.device import default_device, release_memory, return_blocks
from learngenes.family.family import load_family
from learngenes.measuring.device import overhead_bytes
from learngenes.measuring.model import Measurement, measure
from learngenes.model.factors import Own, own_from_stacked
from learngenes.sizing.budget import Workload
from registry.errors import StorageFull

POLL_SECONDS = 0.2
MOST_SECONDS = 1800.0
"""Seconds after which a process counts as hanging."""


class VerificationError(RuntimeError):
    """The measuring process died; the message has its last words."""


class Specimen(BaseModel):
    """Model to measure: a size of a family, under one workload."""

    family: Path
    """Directory of the family."""
    depth: int
    rank: int
    mode: Mode
    dtype: DType
    workload: Workload
    overhead: bool = False
    """Whether to measure, too, what batches of the family need beyond the prediction."""
    own: Path | None = None
    """safetensors file of the model's own parameters; by default the family's Sigma."""


def verify(
    specimen: Specimen,
    own: Own | None = None,
    on_wait: Callable[[], object] = lambda: None,
    *,
    most_seconds: float = MOST_SECONDS,
) -> Measurement:
    """Measure in a fresh process. `on_wait` is called now and then and may raise to stop.

    Raises VerificationError when the process dies, as it does when memory runs out.
    """
    with tempfile.TemporaryDirectory(prefix="fineserve-") as directory:
        if own is not None:
            specimen = specimen.model_copy(update={"own": Path(directory) / "own.safetensors"})
            tensors = {name: tensor.cpu() for name, tensor in own.stacked().items()}
            try:
                save_file(tensors, str(specimen.own))
            except (OSError, SafetensorError) as error:
                raise StorageFull(f"the model cannot be written to {directory}: {error}") from error
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
            deadline = time.monotonic() + most_seconds
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(specimen.model_dump_json())
                process.stdin.close()
                while process.poll() is None:
                    on_wait()
                    time.sleep(POLL_SECONDS)
                    if time.monotonic() > deadline:
                        raise VerificationError(f"measuring took more than {most_seconds:.0f} s")
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
    specimen = Specimen.model_validate_json(sys.stdin.read())
    family = load_family(specimen.family).to(default_device())
    return_blocks(default_device(), family.manifest.network.hidden_states_bytes)
    if specimen.own is not None:
        own = own_from_stacked(load_file(specimen.own)).to(default_device())
    else:
        size = Size(depth=specimen.depth, rank=specimen.rank)
        own = family.own_of(size, specimen.mode, specimen.dtype)
    model = family.assemble(own, specimen.mode, specimen.dtype)
    guide = None
    if (smaller := specimen.workload.sampling.guide) is not None:
        scales = family.own_of(smaller, specimen.mode, specimen.dtype)
        guide = family.assemble(scales, specimen.mode, specimen.dtype)
    release_memory(default_device())  # of what was only stored in another dtype
    measurement = measure(model, family.manifest.diffusion, specimen.workload, guide)
    if specimen.overhead:
        more = overhead_bytes(family)
        measurement = dataclasses.replace(measurement, overhead_bytes=more)
    sys.stdout.write(json.dumps(dataclasses.asdict(measurement)) + "\n")
