"""The functions of a step: as they are, or compiled ahead and kept in a directory.

What is compiled is a graph: a function for everything of it that never changes, such as width and
tokens. Numbers of rows, models and images and ranks vary, so that all sizes of a family have one
graph of each function, and families share those that are the same.
"""

import fcntl
import functools
import hashlib
import inspect
import json
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from learngenes.config import DType, Frozen, NetworkConfig
from learngenes.device import (
    compile_ahead,
    compute_dtype,
    default_device,
    device_class,
    lanes_of,
    load_compiled,
    varying,
)
from learngenes.files import replaced, write_file
from learngenes.stepping import arithmetic, schedules
from learngenes.stepping.arithmetic import BLOCK_KINDS
from learngenes.stepping.lanes import Lanes
from learngenes.stepping.schedules import COLUMNS

FUNCTIONS = ("embed", "materialised_block", "factored_block", "finish")
MANIFEST = "files.json"


class NotOurs(Exception):
    """A directory of compiled code that others may have written to, which is not run."""


class Spoilt(Exception):
    """Compiled code that is not as it was written."""


@dataclass(frozen=True)
class Kernels:
    """The functions of `arithmetic` that a step calls, as they are or compiled, and their lanes."""

    embed: Callable[..., Tensor] = arithmetic.embed
    materialised_block: Callable[..., Tensor] = arithmetic.materialised_block
    factored_block: Callable[..., Tensor] = arithmetic.factored_block
    finish: Callable[..., tuple[Tensor, Tensor]] = arithmetic.finish
    lanes: Lanes = field(default_factory=Lanes)

    @property
    def are_compiled(self) -> bool:
        return self.embed is not arithmetic.embed


class Graph(Frozen):
    """What one function of a step is compiled for."""

    function: str
    """One of FUNCTIONS."""
    compute: str
    """Dtype of products, in torch's words."""
    width: int
    heads: int
    tokens: int
    channels: int = 0
    """Channels, and below pixels on a side: 0 where a function sees none."""
    side: int = 0

    @property
    def name(self) -> str:
        """Name of its file."""
        picture = f"-c{self.channels}s{self.side}" if self.channels else ""
        shape = f"d{self.width}h{self.heads}t{self.tokens}{picture}"
        return f"{self.function}-{self.compute}-{shape}"

    @property
    def arguments(self) -> tuple[object, ...]:
        """Arguments as a batch passes them, of sizes that tell everything apart that varies."""
        d, t, device = self.width, self.tokens, default_device()
        dtype: torch.dtype = getattr(torch, self.compute)
        models, rows, images, rank = 3, 6, 4, 5
        picture = (self.channels, self.side, self.side)

        def zeros(*shape: int, dtype: torch.dtype = dtype, dims: tuple[int, ...] = (0,)) -> Tensor:
            return varying(torch.zeros(shape, dtype=dtype, device=device), dims)

        floats = functools.partial(zeros, dtype=torch.float32)
        shapes = [kind.shape(d) for kind in BLOCK_KINDS]
        patch = self.side // round(t**0.5)
        values = self.channels * patch**2
        if self.function == "embed":
            weight = zeros(values, d, dims=())
            constants = (floats(d, dims=()), floats(t, d, dims=()), patch)
            return floats(rows, *picture), weight, *constants
        if self.function == "materialised_block":
            return (
                zeros(models, rows, t, d, dims=(0, 1)),
                zeros(models, rows, 6 * d, dims=(0, 1)),
                tuple(zeros(models, n, m) for m, n in shapes),
                zeros(models, 9 * d),
                self.heads,
            )
        if self.function == "factored_block":
            most = rank + 2  # more than any model has: a prefix is not the whole
            return (
                zeros(rows, t, d),
                zeros(rows, 6 * d),
                tuple((zeros(n, most, dims=(1,)), zeros(most, m)) for m, n in shapes),
                zeros(rows, len(BLOCK_KINDS), rank, dims=(0, 2)),
                zeros(rows, 9 * d),
                self.heads,
            )
        return (
            zeros(rows, t, d),
            varying(torch.zeros(rows, 6 * d, dtype=dtype, device=device)[:, : 2 * d], (0,)),
            zeros(d, values, dims=()),
            floats(values, dims=()),
            *(floats(images, *shape) for shape in (picture, picture, (len(COLUMNS),), ())),
            *(zeros(images, dtype=torch.long) for _ in range(2)),
        )


def graphs(network: NetworkConfig, dtype: DType) -> list[Graph]:
    """Graphs that models of a network call, when their matrices are stored in `dtype`."""
    compute = str(compute_dtype(dtype, default_device())).removeprefix("torch.")
    block = Graph(
        function="",
        compute=compute,
        width=network.width,
        heads=network.num_attention_heads,
        tokens=network.tokens,
    )
    whole = {"channels": network.in_channels, "side": network.sample_size}
    return [
        block.model_copy(update={"function": name, **({} if name.endswith("block") else whole)})
        for name in FUNCTIONS
    ]


class CompiledGraphs:
    """Directory of compiled graphs, for one release of torch, class of device and arithmetic.

    It is code that is run, so it is only for the user who owns it; a list of its files with their
    SHA-256 tells whether they are as they were written.
    """

    def __init__(self, directory: Path) -> None:
        """Raises NotOurs, or OSError where it cannot be made."""
        device = default_device()
        code = "".join(inspect.getsource(module) for module in (arithmetic, schedules))
        written = hashlib.sha256(code.encode()).hexdigest()[:12]
        self.directory = directory / f"{torch.__version__}-{device_class(device)}-{written}"
        self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._threads = lanes_of(device)[1]
        self._loaded: dict[Graph, Callable[..., object]] = {}
        self._require_ours()

    @property
    def environment(self) -> dict[str, str]:
        """Environment of a process that compiles, or loads: both have to have the same."""
        return {
            "TORCHINDUCTOR_CACHE_DIR": str(self.directory / "inductor"),
            "TRITON_CACHE_DIR": str(self.directory / "triton"),  # a library is loaded from there
            "TORCHINDUCTOR_COMPILE_THREADS": "1",
            "TORCHINDUCTOR_CPP_CACHE_PRECOMPILE_HEADERS": "0",
            "TORCHINDUCTOR_VEC_ISA_OK": "1",  # what the processor can do is known
        }

    def missing(self, wanted: Iterable[Graph]) -> list[Graph]:
        there = self._files()
        return [graph for graph in wanted if _file(graph) not in there]

    @torch.inference_mode()
    def compile(self, graph: Graph) -> None:
        """Compile one unless it is there; takes some ten seconds. One process does at a time.

        The process has `environment`.
        """
        with (self.directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not self.missing([graph]):
                return
            function = getattr(arithmetic, graph.function)
            with replaced(self.directory / _file(graph)) as new:
                compile_ahead(function, graph.arguments, self._threads, new)
            files = [path for path in self.directory.rglob("*") if path.is_file()]
            sums = {
                str(path.relative_to(self.directory)): hashlib.sha256(path.read_bytes()).hexdigest()
                for path in files
                if path.name not in (MANIFEST, "lock")
            }
            write_file(self.directory / MANIFEST, json.dumps(sums).encode(), 0o600)

    def load(self, wanted: Sequence[Graph], lanes: Lanes) -> Kernels:
        """Kernels of compiled graphs, in a process that has `environment`.

        Raises Spoilt, NotOurs, or whatever else loading raises.
        """
        self._require_ours()
        for name, expected in self._files().items():
            path = self.directory / name
            if not path.exists() or hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise Spoilt(f"{path} is not what was compiled")
        for graph in wanted:
            if graph not in self._loaded:
                self._loaded[graph] = load_compiled(self.directory / _file(graph))
        functions = {graph.function: self._loaded[graph] for graph in wanted}
        return Kernels(**functions, lanes=lanes)  # type: ignore[arg-type]

    def _files(self) -> dict[str, str]:
        try:
            files: dict[str, str] = json.loads((self.directory / MANIFEST).read_bytes())
        except (OSError, ValueError):  # nothing is compiled yet, or what was is spoilt
            return {}
        return files

    def _require_ours(self) -> None:
        for path in (self.directory.parent, self.directory, *self.directory.rglob("*")):
            found = path.lstat()
            for_others = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
            if found.st_uid != os.getuid() or (for_others and not stat.S_ISLNK(found.st_mode)):
                raise NotOurs(
                    f"{path} belongs to another user, or others may write to it, and compiled "
                    "code from there is not run: delete it, or set FINESERVE_KERNELS_DIR"
                )


def _file(graph: Graph) -> str:
    return f"{graph.name}.kernel"
