"""`python -m benchmarks.gpu.bundle`: var/gpu-bundle.tar.gz, which checks a GPU without a network.

In it are this code, two families and the wheels that it needs beside a torch for CUDA, numpy
included, that is there already; for Python 3.11 and 3.12.
"""

import re
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
PYTHONS = ("3.11", "3.12")
FAMILIES = ("fashion", "emoji-latents")
CODE = ("benchmarks/__init__.py", "benchmarks/gpu", "fineserve", "learngenes", "registry", "worker")
THERE_ALREADY = {
    *("hf-xet", "mpmath", "networkx", "numpy", "setuptools", "sympy"),  # torch's own, and numpy
    *("fastapi", "fastapi-offline", "onnx", "onnx-ir", "onnxscript", "ml-dtypes", "starlette"),
    *("pygments", "rich", "typer", "uvicorn", "uvloop", "wcwidth", "prompt-toolkit"),
}
"""Packages of a worker's lock that the check never imports, or that come with torch."""
MOST_BYTES = 64 * 2**20


def main() -> None:
    lock = (ROOT / "deploy" / "locks" / "worker.txt").read_text()
    pins = re.findall(r"^([a-z0-9._-]+)(==\S+)", lock, re.MULTILINE)
    wanted = [name + version for name, version in pins if name not in THERE_ALREADY]
    file = ROOT / "var" / "gpu-bundle.tar.gz"
    file.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for python in PYTHONS:
            subprocess.run(
                [
                    *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
                    *("--only-binary", ":all:", "--python-version", python),
                    *("--dest", directory, *wanted),
                ],
                check=True,
            )
        with tarfile.open(file, "w:gz") as bundle:
            for name in (*CODE, *(f"families/{family}" for family in FAMILIES)):
                bundle.add(ROOT / name, f"fineserve-gpu/{name}", filter=_code)
            bundle.add(directory, "fineserve-gpu/wheels")
    size = file.stat().st_size
    sys.stdout.write(f"{file}: {size / 2**20:.1f} MiB; python3 -m benchmarks.gpu.check in it\n")
    if size > MOST_BYTES:
        raise SystemExit(f"that is more than {MOST_BYTES / 2**20:.0f} MiB")


def _code(member: tarfile.TarInfo) -> tarfile.TarInfo | None:
    return None if "__pycache__" in member.name or member.name.endswith(".png") else member


if __name__ == "__main__":
    main()
