"""Everything that differs by device; all other code takes a `torch.device` and runs unchanged."""

import contextlib
import ctypes
import itertools
import math
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import structlog
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from learngenes import nvml
from learngenes.cgroup import memory_limit_bytes, processors_limit
from learngenes.config import DType

log = structlog.get_logger()

M_MMAP_THRESHOLD, M_ARENA_MAX = -3, -8
"""Parameter numbers in glibc's malloc.h."""
LARGE_BYTES = 4 << 20
"""Bytes of one image's hidden states from which on a network counts as large."""
MOST_ARENAS = 2
OTHERS_SHARE = 0.1
"""Share of a GPU's memory that a sampling worker leaves to builds and to what they measure."""
MOST_LANES = 2
"""Most lanes: a guided image has two rows, so that all cores work for a single one."""


class DeviceError(Exception):
    """The device that was asked for is not there; the message says what to do."""


def default_device() -> torch.device:
    """Device that FINESERVE_DEVICE names: `cpu`, `cuda`, or `auto`, which is CUDA where there is
    one. Raises DeviceError.
    """
    wanted = os.environ.get("FINESERVE_DEVICE") or "auto"
    if wanted == "cpu" or (wanted == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise DeviceError(
            f"FINESERVE_DEVICE={wanted}, but torch {torch.__version__} can use no GPU here: "
            "`fineserve doctor` says why"
        )
    return torch.device("cuda")


def use_exact_float32() -> None:
    """Let float32 be float32: no product of it is made in TF32, whose 10 bits of mantissa would
    make an image depend on what else is in its batch. What is to be quick is in bfloat16."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def training_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Autocast that makes products in bfloat16 where hardware does; the rest stays float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=native_bfloat16(device))


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Scaled dot-product attention; all (N, heads, T, D/heads).

    On a CPU torch's own takes five times as long as the products written out, when it has to go
    backward in bfloat16 (49 tokens, batch 128, torch 2.13).
    """
    if q.device.type == "cuda" or q.dtype != torch.bfloat16 or not q.requires_grad:
        return F.scaled_dot_product_attention(q, k, v)
    with torch.autocast(q.device.type, enabled=False):  # it would widen the softmax
        scores: Tensor = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        return scores.softmax(dim=-1) @ v


def decoded_together(device: torch.device) -> int:
    """Number of latents that one call decodes; one on a CPU, so that images never differ."""
    return 4 if device.type == "cuda" else 1


def packing_threads(device: torch.device) -> int:
    """Threads that oneDNN packs operands for in a bfloat16 product; 0 where it is not used."""
    return torch.get_num_threads() if device.type == "cpu" and native_bfloat16(device) else 0


def lanes_of(device: torch.device) -> tuple[int, int]:
    """Number of lanes (`learngenes.stepping.lanes`) that step a batch, and of threads in each."""
    threads = torch.get_num_threads()
    count = 1 if device.type == "cuda" else min(MOST_LANES, threads)
    return count, threads // count


def compute_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """Dtype that a model computes in when its matrices are stored in `dtype`."""
    if dtype is DType.FLOAT32 or not native_bfloat16(device):
        return torch.float32
    return torch.bfloat16


def device_class(device: torch.device) -> str:
    """Name of a class of equally fast devices, in letters, digits and hyphens."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"cpu {_processor()} {capability} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def device_id(device: torch.device) -> str:
    """Name of this one device, which nobody else's has: a GPU's UUID, or that of a MIG slice; of
    CPUs this boot of the machine."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_properties(device).uuid)
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return platform.node()


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def compile_ahead(
    function: Callable[..., object], arguments: tuple[object, ...], threads: int, file: Path
) -> None:
    """Compile `function` for arguments like these, of any size where they are `varying`.

    Writes what `load_compiled` reads; what belongs to it stays in TORCHINDUCTOR_CACHE_DIR. On a
    CPU it uses `threads` threads and releases Python's lock, so that lanes run side by side.
    """
    how: dict[str, Any] = {"cpp_wrapper": True, "cpp.threads": threads}
    if default_device().type == "cuda":
        # graphs of parts of a step would be recorded while requests wait, for each path through
        # it, and copy every weight into them: a whole step is captured instead (`WholeStep`)
        how = {"triton.cudagraphs": False}
    made = torch.compile(function, fullgraph=True, options=how)
    made.aot_compile((arguments, {})).save_compiled_function(str(file))  # type: ignore[attr-defined]


def load_compiled(file: Path) -> Callable[..., Any]:
    """What `compile_ahead` wrote, which is code: the file must be one's own.

    It takes any size, one included, of what was `varying`, and no other argument is checked:
    a guard for each call would cost as much as a small kernel.
    """
    with file.open("rb") as opened:
        made = torch.compiler.load_compiled_function(opened)
    made.disable_guard_check()  # type: ignore[attr-defined]
    return made


def varying(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    """Mark dimensions that differ from call to call, so that one kernel serves every size."""
    for dim in dims:
        torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


WARM_STEPS = 3
"""Steps of a batch before it is captured: those who come and go soon never are."""


class WholeStep:
    """A step that changes its tensors in place: called as it is, or on CUDA replayed as one graph.

    Launching its kernels one by one takes a CPU longer than a GPU takes for a small network. It is
    captured after WARM_STEPS, where FINESERVE_CUDA_GRAPHS says so; where that fails it is called
    as before.
    """

    def __init__(self, step: Callable[[], None], device: torch.device) -> None:
        self._step, self._device, self._done = step, device, 0
        self._graph: torch.cuda.CUDAGraph | None = None
        self._captures = device.type == "cuda" and captures_steps()

    def __call__(self) -> None:
        if self._captures and self._graph is None and self._done == WARM_STEPS:
            self._capture()
        self._done += 1
        if self._graph is None:
            self._step()
        else:
            self._graph.replay()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):  # nothing is computed yet
                self._step()
        except Exception as error:
            log.warning("a step cannot be captured, and is called as it is", reason=str(error))
            self._captures = False
        else:
            self._graph = graph


def captures_steps() -> bool:
    """Whether steps are captured as CUDA graphs, which no card has measured yet."""
    return os.environ.get("FINESERVE_CUDA_GRAPHS", "").lower() in ("1", "true", "yes", "on")


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """Limit this thread to `count` OpenMP threads, and threads that first compute meanwhile.

    Each thread that computes gets a team of its own, and when all teams have more threads than
    there are cores they wait asleep: small operations then take three times as long.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronise(device: torch.device) -> None:
    """Wait for queued work, so that a clock measures it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """Most bytes that the allocator held at once during `work`, above those it held before.

    On CUDA the caching allocator keeps this figure; what cuBLAS takes for itself, 32 MiB on a
    Hopper, counts, too. On the CPU every allocation and release
    of torch's allocator is recorded by the profiler and summed in order, which is exact for
    tensors and, unlike the resident set size, free of the allocator's caching.
    """
    if device.type == "cuda":
        forget_workspaces()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return int(torch.cuda.max_memory_allocated(device)) - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else a line on stderr for each profile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    assert recorded.profiler is not None
    assert recorded.profiler.kineto_results is not None
    events = recorded.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), int(e.nbytes())) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate((nbytes for _, nbytes in changes), initial=0))


def forget_workspaces() -> None:
    """Free what cuBLAS has taken for itself; its next product takes it again."""
    torch.cuda.synchronize()
    torch._C._cuda_clearCublasWorkspaces()


def share_arenas() -> None:
    """Make all threads share a few heaps, where the C library is glibc.

    glibc gives up to eight heaps a core to threads that ask at the same time, and memory that is
    free in the heap of one thread is of no use to the others.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, MOST_ARENAS)


def returns_blocks(device: torch.device, hidden_states_bytes: int) -> bool:
    """Whether all that is freed is at once the system's again: of a large network on a CPU, where
    the C library is glibc, once `return_blocks` was called."""
    large = device.type == "cpu" and hidden_states_bytes >= LARGE_BYTES
    return large and hasattr(ctypes.CDLL(None), "mallopt")


def return_blocks(device: torch.device, hidden_states_bytes: int) -> None:
    """Give large blocks back to the system as they are freed, if a network is large.

    glibc keeps those below 32 MiB, and a step leaves holes of some hundred MB between them: no
    longer could anybody foresee what a process takes. Small networks use them again.
    """
    if returns_blocks(device, hidden_states_bytes):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def release_memory(device: torch.device) -> None:
    """Return the memory of freed tensors from the allocator to the system."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc's; another C library keeps less
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def trim_memory(device: torch.device) -> None:
    """Return the holes between tensors that stay; CUDA's allocator fills them by itself, and to
    empty its cache waits for all that runs."""
    if device.type != "cuda":
        release_memory(device)


def require_usable(device: torch.device) -> None:
    """Raise what a device raises on which nothing can be computed any more.

    After some errors every later call of this process fails, and only a new one helps.
    """
    if device.type == "cuda":
        torch.ones(1, device=device).add_(1)
        torch.cuda.synchronize(device)


def capacity_bytes(device: torch.device) -> int:
    """Bytes of memory that this process may use: of a CPU's, half of the container's; of a GPU's
    what nobody has, and never the share of it that builds and verifying processes need."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)  # after this process's own context
        return min(free, int((1 - OTHERS_SHARE) * total))
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min(total, memory_limit_bytes() or total) // 2


def limit_threads() -> None:
    """Compute with no more threads than a container may use processors: torch counts cores."""
    if (processors := processors_limit()) is not None:
        torch.set_num_threads(max(1, min(torch.get_num_threads(), math.ceil(processors))))


def process_resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def process_peak_bytes(device: torch.device) -> int:
    """Most bytes that this process has held on the device since it began, runtime included.

    On the CPU the largest resident set, libraries and all, which is what a container's limit
    counts. On CUDA what the allocator reserved and what the context takes besides.
    """
    if device.type == "cuda":
        reserved = torch.cuda.memory_reserved(device)
        context = max(0, nvml.process_bytes(device_id(device)) - reserved)
        return int(torch.cuda.max_memory_reserved(device)) + context
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's, too
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
