"""Twenty models of different sizes in one batch, beside the commit before; and what they hold."""

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import IO

from benchmarks import baseline
from benchmarks.parts import REPOSITORY, Figures, say
from benchmarks.serving.subjects import MIX, family, sizes
from learngenes.config import DType
from learngenes.stepping.weights import FactoredWeights, SharedWeights

CLIENTS = 16
ROUNDS = 6
SECONDS = 8


def measure() -> Figures:
    before, now = _alternating([baseline.checkout(), REPOSITORY])
    shared = SharedWeights(family(), DType.BFLOAT16)
    models = [FactoredWeights(shared, shared.family.scales_of(size)) for size in sizes(MIX)]
    factored = [*itertools.accumulate((model.nbytes for model in models), initial=shared.nbytes)]
    written = [
        factored[count] + sum(m.materialised_nbytes for m in models[:count]) for count in (1, MIX)
    ]
    return {
        "mix20_over_7f885ee": round(now / before, 3),
        "resident_20_over_1": round(factored[MIX] / factored[1], 3),
        "images_per_second": {"before": round(before, 1), "now": round(now, 1)},
        "resident_bytes": {"1": factored[1], "20": factored[MIX]},
        "resident_bytes_written_out": {"1": written[0], "20": written[1]},
    }


def _alternating(repositories: list[Path]) -> list[float]:
    """Median images a second of each, in turn."""
    script = Path(__file__).with_name("mixer.py")
    processes = [
        subprocess.Popen(
            [sys.executable, script, str(CLIENTS), str(SECONDS)],
            cwd=repository,
            env=baseline.environment(repository),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for repository in repositories
    ]
    speeds: list[list[float]] = [[] for _ in processes]
    for _ in range(ROUNDS):
        for process, found in zip(processes, speeds, strict=True):
            assert process.stdin is not None
            assert process.stdout is not None
            found.append(_asked(process.stdin, process.stdout))
        say("images a second", before=speeds[0][-1], now=speeds[1][-1])
    for process in processes:
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
    return [statistics.median(found) for found in speeds]


def _asked(stdin: IO[str], stdout: IO[str]) -> float:
    stdin.write("go\n")
    stdin.flush()
    return float(json.loads(stdout.readline()))
