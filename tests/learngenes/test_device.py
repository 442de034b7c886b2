import contextlib
import ctypes
import re
import subprocess
import sys
import types
from typing import ClassVar

import pytest
import torch

from learngenes.config import DType
from learngenes.device import (
    LARGE_BYTES,
    WARM_STEPS,
    DeviceError,
    WholeStep,
    attention,
    capacity_bytes,
    compute_dtype,
    default_device,
    device_class,
    device_id,
    native_bfloat16,
    packing_threads,
    peak_bytes,
    process_peak_bytes,
    release_memory,
    require_usable,
    returns_blocks,
    synchronise,
    trim_memory,
    use_exact_float32,
)

CUDA = torch.device("cuda")
CPU = torch.device("cpu")
MEGABYTE = 2**20


def test_a_device_class_can_stand_in_a_key() -> None:
    assert re.fullmatch(r"cpu-[a-z0-9-]+-1-threads", device_class(CPU))


def test_two_threads_are_another_class_than_one() -> None:
    one = device_class(CPU)
    torch.set_num_threads(2)
    try:
        assert device_class(CPU) != one
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("native", [False, True])
def test_only_narrow_storage_on_a_device_made_for_it_is_computed_in_bfloat16(
    native: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cpu.get_capabilities", lambda: {"avx512_bf16": native})
    assert native_bfloat16(CPU) == native
    assert packing_threads(CPU) == (1 if native else 0)
    narrow = torch.bfloat16 if native else torch.float32
    assert [compute_dtype(dtype, CPU) for dtype in DType] == [torch.float32, *[narrow] * 4]


def test_the_peak_is_the_most_that_was_alive_at_once() -> None:
    held = torch.zeros(MEGABYTE, dtype=torch.uint8)

    def work() -> None:
        first = torch.zeros(3 * MEGABYTE, dtype=torch.uint8)
        second = torch.zeros(MEGABYTE, dtype=torch.uint8)
        del first
        third = torch.zeros(2 * MEGABYTE, dtype=torch.uint8)
        del second, third

    assert peak_bytes(work, CPU) == 4 * MEGABYTE
    assert peak_bytes(lambda: None, CPU) == 0
    assert held.sum() == 0


def test_the_peak_of_a_process_stays_when_memory_is_given_back() -> None:
    large = torch.ones(64 * MEGABYTE, dtype=torch.uint8)
    peak = process_peak_bytes(CPU)
    assert peak > 64 * MEGABYTE
    del large
    release_memory(CPU)
    assert process_peak_bytes(CPU) > peak - MEGABYTE  # the kernel counts in batches of pages


def test_without_cuda_the_device_is_the_cpu() -> None:
    synchronise(CPU)
    assert default_device().type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize(
    ("wanted", "there", "given"),
    [
        ("auto", True, "cuda"),
        ("auto", False, "cpu"),
        ("", True, "cuda"),
        ("cpu", True, "cpu"),
        ("cuda", True, "cuda"),
    ],
)
def test_the_device_is_the_one_that_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, wanted: str, there: bool, given: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    monkeypatch.setenv("FINESERVE_DEVICE", wanted)
    assert default_device().type == given


def test_a_gpu_that_is_asked_for_and_not_there_is_no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv("FINESERVE_DEVICE", "cuda")
    with pytest.raises(DeviceError, match="fineserve doctor"):
        default_device()


@pytest.mark.parametrize(
    ("free", "given"), [(20 * 10**9, 20 * 10**9), (23.9 * 10**9, 21.6 * 10**9), (10**9, 10**9)]
)
def test_of_a_gpu_no_more_is_used_than_is_free(
    monkeypatch: pytest.MonkeyPatch, free: float, given: float
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (int(free), 24 * 10**9))
    assert capacity_bytes(CUDA) == int(given)


def test_each_device_has_a_name_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    assert re.fullmatch(r"[0-9a-f-]{36}", device_id(CPU))
    properties = types.SimpleNamespace(uuid="2f3e")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    assert device_id(CUDA) == "2f3e"


def test_what_a_process_takes_of_a_gpu_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(uuid="2f3e")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 300)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: 700)
    monkeypatch.setattr("learngenes.nvml.process_bytes", lambda uuid: {"2f3e": 500}[uuid])
    assert process_peak_bytes(CUDA) == 700 + (500 - 300)
    monkeypatch.setattr("learngenes.nvml.process_bytes", lambda _: 0)  # nobody can say
    assert process_peak_bytes(CUDA) == 700


def test_a_device_on_which_nothing_works_any_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    require_usable(CPU)

    def gone(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: device-side assert triggered")

    monkeypatch.setattr(torch, "ones", gone)
    with pytest.raises(RuntimeError, match="device-side assert"):
        require_usable(CUDA)


def test_holes_are_left_to_the_allocator_of_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    emptied: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: emptied.append("all"))
    trim_memory(CUDA)
    assert emptied == []
    release_memory(CUDA)
    assert emptied == ["all"]


def test_float32_is_float32() -> None:
    use_exact_float32()
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


class Recording:
    """In place of a CUDA graph: what it replays is noted."""

    made: ClassVar[list["Recording"]] = []

    def __init__(self) -> None:
        self.replays = 0
        self.made.append(self)

    def replay(self) -> None:
        self.replays += 1


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Steps that were called, where whole steps are captured."""
    Recording.made.clear()
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda _: contextlib.nullcontext())
    monkeypatch.setenv("FINESERVE_CUDA_GRAPHS", "true")
    return []


def test_a_step_that_stays_is_captured_once_and_replayed(steps: list[str]) -> None:
    whole = WholeStep(lambda: steps.append("step"), CUDA)
    for _ in range(WARM_STEPS):
        whole()
    assert (len(steps), Recording.made) == (WARM_STEPS, [])
    for _ in range(5):
        whole()
    (graph,) = Recording.made
    assert (len(steps), graph.replays) == (WARM_STEPS + 1, 5)


def test_a_step_that_cannot_be_captured_is_called(
    steps: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", refuse)
    whole = WholeStep(lambda: steps.append("step"), CUDA)
    for _ in range(9):
        whole()
    assert len(steps) == 9


@pytest.mark.parametrize(("device", "said"), [(CPU, "true"), (CUDA, "false"), (CUDA, "")])
def test_nothing_is_captured_unless_it_is_asked_for(
    steps: list[str], monkeypatch: pytest.MonkeyPatch, device: torch.device, said: str
) -> None:
    monkeypatch.setenv("FINESERVE_CUDA_GRAPHS", said)
    whole = WholeStep(lambda: steps.append("step"), device)
    for _ in range(9):
        whole()
    assert (len(steps), Recording.made) == (9, [])


@pytest.mark.gpu
def test_the_peak_is_the_most_that_was_alive_at_once_on_cuda() -> None:
    device = torch.device("cuda")

    def work() -> None:
        torch.zeros(4 * MEGABYTE, dtype=torch.uint8, device=device)

    assert peak_bytes(work, device) == 4 * MEGABYTE
    assert process_peak_bytes(device) > 4 * MEGABYTE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_forward_and_backward_is_torchs_own(dtype: torch.dtype) -> None:
    q, k, v = (
        torch.randn(2, 3, 7, 8, generator=torch.Generator().manual_seed(i)).requires_grad_()
        for i in range(3)
    )
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        given = attention(*(t.to(dtype) for t in (q, k, v)))
    assert given.dtype == dtype
    atol = 1e-5 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(given.float(), expected, atol=atol, rtol=0)
    for mine, plain in zip(
        torch.autograd.grad(given.float().square().sum(), [q, k, v]),
        torch.autograd.grad(expected.square().sum(), [q, k, v]),
        strict=True,
    ):
        torch.testing.assert_close(mine, plain, atol=10 * atol, rtol=0)


ARENAS = """
import ctypes, sys, threading
from learngenes.device import share_arenas
if sys.argv[1] == "shared":
    share_arenas()
together = threading.Barrier(12)
def hold():
    memory = bytearray(100_000)
    together.wait()
threads = [threading.Thread(target=hold) for _ in range(12)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
libc = ctypes.CDLL(None)
libc.malloc_info(0, ctypes.c_void_p.in_dll(libc, "stdout"))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_info"), reason="of glibc alone")
def test_threads_take_their_memory_from_a_few_heaps() -> None:
    def heaps(how: str) -> int:
        command = [sys.executable, "-c", ARENAS, how]
        told = subprocess.run(command, check=True, capture_output=True, text=True)
        return told.stdout.count("<heap nr=")

    assert heaps("as ever") > 2
    assert heaps("shared") <= 2


BLOCKS = """
import sys, torch
from learngenes.device import LARGE_BYTES, process_resident_bytes, return_blocks
if sys.argv[1] == "returned":
    return_blocks(torch.device("cpu"), LARGE_BYTES)
torch.ones(20_000_000, dtype=torch.uint8)
before = process_resident_bytes()
block = torch.ones(20_000_000, dtype=torch.uint8)
above = torch.ones(100_000, dtype=torch.uint8)
del block
sys.stdout.write(str(process_resident_bytes() - before))
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc alone")
def test_large_blocks_are_the_systems_again_once_they_are_freed() -> None:
    def kept(how: str) -> int:
        command = [sys.executable, "-c", BLOCKS, how]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert kept("as ever") > 15_000_000
    assert kept("returned") < 5_000_000


def test_only_large_networks_on_a_cpu_return_their_blocks() -> None:
    assert returns_blocks(CPU, LARGE_BYTES)
    assert not returns_blocks(CPU, LARGE_BYTES - 1)
    assert not returns_blocks(torch.device("cuda"), LARGE_BYTES)
