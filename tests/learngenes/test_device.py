import ctypes
import re
import subprocess
import sys

import pytest
import torch

from learngenes.config import DType
from learngenes.device import (
    attention,
    compute_dtype,
    default_device,
    device_class,
    native_bfloat16,
    packing_threads,
    peak_bytes,
    process_peak_bytes,
    release_memory,
    synchronise,
)

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
