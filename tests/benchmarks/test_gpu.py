"""The check of a GPU, where there is none: it says so, and its parts run on a CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.check import PARTS, SKIPPED


def check(*words: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu.check", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_is_skipped() -> None:
    done = check()
    assert done.returncode == SKIPPED
    assert "GPU_PYTHON" in done.stdout


@pytest.mark.slow
def test_every_part_runs_on_a_cpu(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    done = check("--device", "cpu", "--out", str(out))
    results = json.loads(out.read_text())
    assert [name for name in results if "error" in results[name]] == []
    assert list(results) == list(PARTS)
    assert done.returncode == 0
    assert results["correctness"]["mixed_over_alone"]["largest"] == 0
    assert results["failures"]["overload_survived"]
    for name, figures in results["memory"]["alone"].items():
        assert figures["measured_bytes"] <= 1.1 * figures["predicted_bytes"], name
