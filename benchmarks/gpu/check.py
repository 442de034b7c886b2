"""`python -m benchmarks.gpu.check [--device cpu] [--out FILE]`: all parts, each in a process.

Nothing but the standard library is imported here, so that any Python can look for one that has a
torch for CUDA. What a part has measured is written as soon as it has ended.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
SKIPPED = 77
PARTS = {
    "environment": 20,
    "correctness": 70,
    "memory": 70,
    "step": 150,
    "failures": 40,
    "promises": 60,
    "dit_xl": 40,
    "training": 30,
}
"""Seconds that each part may take, in the order of what it is worth to know."""
CPU_SECONDS = 600
"""The same on a CPU, where a smaller setting shows that the parts run."""
VERSION = "import sys; print('cp%d%d' % sys.version_info[:2])"
PROBE = "import torch; raise SystemExit(not torch.cuda.is_available())"


def python_with_cuda() -> str | None:
    """A Python whose torch can use a GPU: $GPU_PYTHON, this checkout's, or python3."""
    candidates = [os.environ.get("GPU_PYTHON"), ROOT / ".venv" / "bin" / "python", "python3"]
    for candidate in candidates:
        found = shutil.which(str(candidate)) if candidate else None
        if found is None:
            continue
        tried = subprocess.run([found, "-c", PROBE], capture_output=True, check=False)
        if tried.returncode == 0:
            return found
    return None


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--out", type=Path, default=ROOT / "var" / "gpu-check.json")
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], default=[])
    options = parser.parse_args()
    python = sys.executable if options.device == "cpu" else python_with_cuda()
    if python is None:
        tell("SKIPPED: no Python here has a torch that can use a GPU; GPU_PYTHON names one")
        return SKIPPED
    environment = {**os.environ, "FINESERVE_DEVICE": options.device}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        path = [str(ROOT), *_unpacked(python, Path(directory))]
        environment["PYTHONPATH"] = os.pathsep.join(path)
        for name in options.parts or PARTS:
            began = time.monotonic()
            results[name] = _part(python, name, options.device, environment)
            results[name]["seconds"] = round(time.monotonic() - began, 1)
            options.out.write_text(json.dumps(results, indent=1) + "\n")
            tell(f"{name}: {json.dumps(results[name])}")
    broken = [name for name, result in results.items() if "error" in result]
    tell(f"{len(results) - len(broken)} of {len(results)} parts ran; {options.out}")
    return int(bool(broken))


def _part(python: str, name: str, device: str, environment: dict[str, str]) -> dict[str, Any]:
    seconds = PARTS[name] if device == "cuda" else CPU_SECONDS
    command = [python, "-m", "benchmarks.gpu.parts", name]
    try:
        done = subprocess.run(
            command,
            cwd=ROOT,
            env=environment,
            capture_output=True,
            text=True,
            timeout=seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return {"error": f"it took more than {seconds} s"}
    if done.returncode:
        return {"error": f"status {done.returncode}: {done.stderr[-1500:]}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def _unpacked(python: str, into: Path) -> list[str]:
    """Directory of the wheels of a bundle that fit a Python; none where this is no bundle."""
    wheels = ROOT / "wheels"
    if not wheels.is_dir():
        return []
    told = subprocess.run([python, "-c", VERSION], capture_output=True, text=True, check=True)
    tags = ("-none-any.whl", "-abi3-", f"-{told.stdout.strip()}-")
    for wheel in wheels.iterdir():
        if any(tag in wheel.name for tag in tags):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(into)
    return [str(into)]


def tell(what: str) -> None:
    sys.stdout.write(f"{what}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    raise SystemExit(main())
