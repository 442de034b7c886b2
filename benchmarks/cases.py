"""`python -m benchmarks.cases DIR [NUMBER …]`: cases of a folder of reported faults, tried here.

A case is a folder with `run.py BASE_URL …` or `run.sh …`, which ends with 0 where the fault is not
there, 1 where it is, and 2 where it cannot tell.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.deployment import Deployment
from benchmarks.parts import REPOSITORY

OUTCOMES = {0: "PASS", 2: "SKIP"}
MOST_SECONDS = 600


def main(source: Path, only: list[str]) -> int:
    failed = []
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory) / "cases"
        shutil.copytree(source, folder)  # they write beside themselves
        with Deployment(trusted_proxies="127.0.0.1") as deployment:
            deployment.up()
            deployment.ready_model(max_mem_gb=4)
            for case in sorted(path for path in folder.iterdir() if path.is_dir()):
                if only and case.name.partition("-")[0] not in only:
                    continue
                outcome, seconds, told = run(case, deployment)
                sys.stdout.write(f"{outcome} {case.name} ({seconds:.0f} s)\n")
                sys.stdout.flush()
                if outcome != "PASS":
                    failed.append(case.name)
                    sys.stdout.write("".join(f"    {line}\n" for line in told.splitlines()))
    sys.stdout.write(f"not passed: {', '.join(failed) or 'none'}\n")
    return 1 if failed else 0


def run(case: Path, deployment: Deployment) -> tuple[str, float, str]:
    """What a case found, in how many seconds, and what it said."""
    python, number = sys.executable, case.name.partition("-")[0]
    port = deployment.url.rpartition(":")[2]
    script = case / "run.sh"
    if script.exists():
        command = ["bash", str(script), port if number == "23" else python]
    else:
        arguments = {
            "35": [deployment.url, deployment.redis_url],
            "36": [],
            "38": [deployment.url, str(deployment.var / "metrics")],
        }
        command = [python, str(case / "run.py"), *arguments.get(number, [deployment.url])]
    environment = {**os.environ, "FINESERVE": str(deployment.bin / "fineserve")}
    began = time.perf_counter()
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment,
        capture_output=True,
        text=True,
        timeout=MOST_SECONDS,
        check=False,
    )
    outcome = OUTCOMES.get(done.returncode, "FAIL")
    return outcome, time.perf_counter() - began, done.stdout + done.stderr


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
