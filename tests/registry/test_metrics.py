import subprocess
import sys
from pathlib import Path

COUNT = """
import os, sys
os.environ["PROMETHEUS_MULTIPROC_DIR"] = sys.argv[1]
from registry import metrics
metrics.PLANS.labels("solved").inc()
print(next(s.value for m in metrics.registry().collect() for s in m.samples
           if s.name == "fineserve_plans_total" and s.labels["outcome"] == "solved"), flush=True)
sys.stdin.read()
"""


def begun(folder: Path) -> "subprocess.Popen[str]":
    """A process that counts one plan, tells how many there are, and waits to be ended."""
    return subprocess.Popen(
        [sys.executable, "-c", COUNT, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def test_a_place_is_taken_over_from_a_dead_process(tmp_path: Path) -> None:
    counts = []
    for _ in range(3):
        with begun(tmp_path) as process:
            counts.append(float(process.stdout.readline()))
            process.kill()
    assert counts == [1, 2, 3], "what a dead process has counted stays"
    assert {file.name.split("_")[-1] for file in tmp_path.glob("*.db")} == {"place-0.db"}
    with begun(tmp_path) as one:
        assert float(one.stdout.readline()) == 4
        with begun(tmp_path) as other:
            assert float(other.stdout.readline()) == 5
            assert len([*tmp_path.glob("counter_*.db")]) == 2, "one lives in the first place"
            other.kill()
        one.kill()
