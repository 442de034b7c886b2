"""All that differs by device. Everything else takes a `torch.device` and runs unchanged."""

import contextlib
import ctypes
import itertools
import os
import platform
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch
import torch._dynamo
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from learngenes.config import DType

P = ParamSpec("P")
R = TypeVar("R")

M_ARENA_MAX = -8
"""Of glibc's malloc.h."""
MOST_ARENAS = 2
MOST_LANES = 2
"""As many as a guided image has rows, so that all cores work for one alone."""
MOST_COMPILED = 256
"""Times that one function is compiled, for families and dtypes; torch's own setting for it, 8 by
default, is one for each thread."""


def default_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def native_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 products run in hardware; emulated ones are slower than float32."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu.get_capabilities().get("avx512_bf16", False))


def training_precision(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Products in bfloat16 where it runs in hardware; weights and the rest stay float32."""
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
    """Latents that are made into images by one call: on a CPU each alone, so that an image has
    the same bytes whatever else is decoded."""
    return 4 if device.type == "cuda" else 1


def packing_threads(device: torch.device) -> int:
    """Threads that oneDNN packs operands for in a bfloat16 product; 0 where it is not used."""
    return torch.get_num_threads() if device.type == "cpu" and native_bfloat16(device) else 0


def lanes_of(device: torch.device) -> tuple[int, int]:
    """Lanes (`learngenes.stepping.lanes`) that step a batch, and threads that each may have."""
    threads = torch.get_num_threads()
    count = 1 if device.type == "cuda" else min(MOST_LANES, threads)
    return count, threads // count


def compute_dtype(dtype: DType, device: torch.device) -> torch.dtype:
    """What a model with matrices stored in `dtype` computes in."""
    if dtype is DType.FLOAT32 or not native_bfloat16(device):
        return torch.float32
    return torch.bfloat16


def device_class(device: torch.device) -> str:
    """Devices of one class are as fast as each other: letters, digits and hyphens."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        capability = torch.backends.cpu.get_cpu_capability()
        name = f"cpu {_processor()} {capability} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return found[1]
    return platform.machine()


def compiled(function: Callable[P, R], device: torch.device, threads: int) -> Callable[P, R]:
    """By torch.compile, when it is first called; on CUDA as a graph for each number of rows.

    On a CPU it has so many threads, and runs without Python's lock, so that lanes can run side by
    side. What was compiled for other arguments stays in its order, since two lanes look through it
    at the same time, and one would miss what the other moves to the front.
    """
    how: dict[str, Any] = {"recompile_limit": MOST_COMPILED}
    if device.type == "cuda":
        how["mode"] = "reduce-overhead"
    else:
        torch._C._dynamo.eval_frame._set_lru_cache(False)  # type: ignore[attr-defined]
        how["options"] = {"cpp_wrapper": True, "cpp.threads": threads}
    made: Callable[P, R] = torch.compile(function, **how)
    return made


def varying(tensor: Tensor, dims: Iterable[int]) -> Tensor:
    """Mark what differs from call to call, so that one kernel is compiled for every size."""
    for dim in dims:
        if tensor.shape[dim] > 1:
            torch._dynamo.mark_dynamic(tensor, dim)
    return tensor


def begin_step(device: torch.device) -> None:
    """From here on CUDA graphs may write over what they gave in the step before."""
    if device.type == "cuda":
        torch.compiler.cudagraph_mark_step_begin()


def kept(tensor: Tensor) -> Tensor:
    """What a compiled function gave, to be used in later steps."""
    return tensor.clone() if tensor.device.type == "cuda" else tensor


def never_compile() -> contextlib.AbstractContextManager[object]:
    """What is not compiled by now runs as it is: a request must not wait for a compiler."""
    stance: contextlib.AbstractContextManager[object] = torch.compiler.set_stance(
        "eager_on_recompile"
    )
    return stance


def padded(rows: int, device: torch.device) -> int:
    """How many rows a batch of `rows` is run as: a CUDA graph is recorded for each number, so there
    are few of them."""
    if device.type != "cuda":
        return rows
    power = 1 << max(1, (rows - 1).bit_length())
    between = 3 * power // 4
    return between if rows <= between and between % 2 == 0 else power


@contextlib.contextmanager
def with_threads(count: int) -> Iterator[None]:
    """So many OpenMP threads for what this thread does inside, and for threads that first compute
    meanwhile.

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
    """Wait for queued work, so that a clock tells the truth."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int:
    """The most that the allocator held at once during `work`, above what it held before.

    On CUDA the caching allocator keeps this figure. On the CPU every allocation and release
    of torch's allocator is recorded by the profiler and summed in order, which is exact for
    tensors and, unlike the resident set size, free of the allocator's caching.
    """
    if device.type == "cuda":
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


def share_arenas() -> None:
    """Let all threads take memory from a few heaps, where the C library is glibc.

    It gives up to eight heaps a core to threads that ask at the same time, and what a request of
    one thread leaves free in its heap is of no use to the other threads.
    """
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(M_ARENA_MAX, MOST_ARENAS)


def release_memory(device: torch.device) -> None:
    """Give back to the system what the allocator keeps of freed tensors."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # glibc's; another C library keeps less
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def capacity_bytes(device: torch.device) -> int:
    """What this process can expect to have of the device's memory.

    Of a CPU's, half: of the machine's or of what the container may use, if that is less.
    """
    if device.type == "cuda":
        _, total = torch.cuda.mem_get_info(device)
        return int(0.9 * total)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):  # "max", or no cgroup
        total = min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total // 2


def process_resident_bytes() -> int:
    """What this process holds of the machine's memory now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def process_peak_bytes(device: torch.device) -> int:
    """The most that this process has held on the device since it began, runtime included.

    On the CPU the largest resident set, libraries and all, which is what a container's limit
    counts. On CUDA what the allocator reserved and what the context takes besides.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context = total - free - torch.cuda.memory_reserved(device)
        return int(torch.cuda.max_memory_reserved(device)) + context
    status = Path("/proc/self/status").read_text()  # ru_maxrss would count the parent's, too
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024
