"""Checks 1, 5 and 6: images a second and latency of every server, for one model and for 20.

All have the same weights, two threads and the same requests. The plain server is measured as it
comes (float32, uncompiled) and at its best; the others at their best. The speed of a machine may
change within minutes, so each load is put on ours and on an opponent in turn, while all processes
of the other are stopped, and only such pairs are compared.
"""

import functools
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from benchmarks.parts import Figures, say
from benchmarks.serving import latency
from benchmarks.serving.load import MakeRequest, Result, closed_loop, open_loop
from benchmarks.serving.opponents import paused, running
from benchmarks.serving.subjects import SEED, Served, peer_requests, requests, served

CLIENTS = (1, 4, 16)
SECONDS = 8.0
WARM_UP_SECONDS = 2.0
OPEN_SECONDS = 10.0
RATES = {"poisson_low": 0.15, "poisson_high": 0.7}
"""Arrivals a second, of the images that fineserve makes for 16 clients. The low rate is one that
every server can bear; the high one is not."""
LOADS = (*(f"{clients}_clients" for clients in CLIENTS), *RATES)
SCENARIOS = ("one", "mix20")
SHOWN = ("images_per_second", "latency_p50", "latency_p95", "latency_p99")
OURS, PLAIN = "fineserve", "plain float32"
OPPONENTS: dict[str, tuple[str, str, bool]] = {
    PLAIN: ("plain", "float32", False),
    "plain bfloat16": ("plain", "bfloat16", False),
    "plain bfloat16 compiled": ("plain", "bfloat16", True),
    "LitServe": ("litserve", "bfloat16", True),
    "Ray Serve": ("ray_serve", "bfloat16", True),
    "BentoML": ("bentoml", "bfloat16", True),
}
"""Server, dtype, whether torch.compile is on."""
BEST_PLAIN = ("plain bfloat16", "plain bfloat16 compiled")


@dataclass(frozen=True)
class Side:
    url: str
    make: MakeRequest
    pids: Callable[[], list[int]]


def measure() -> Figures:
    windows: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="fineserve-export-") as directory, served() as ours:
        ours.export(Path(directory))
        alone = latency.measure(ours)
        models = {"one": [ours.one], "mix20": ours.mix}
        rates = {scenario: _rates(ours, of) for scenario, of in models.items()}
        for name, (server, dtype, compiled) in OPPONENTS.items():
            with running(server, Path(directory), dtype=dtype, compiled=compiled) as opponent:
                windows[name] = {
                    scenario: _pairs(
                        f"{name}, {scenario}",
                        Side(ours.url, requests(of), ours.deployment.pids),
                        Side(opponent.url, peer_requests(server, of), opponent.pids),
                        rates[scenario],
                    )
                    for scenario, of in models.items()
                }
    return {
        "servers": _by_server(windows),
        "rates": rates,
        "pairs": windows,
        **alone,
        **summary(windows),
    }


def _rates(ours: Served, models: list[str]) -> dict[str, float]:
    """Arrivals a second of the open loads; what this measures counts for nothing else."""
    most = closed_loop(ours.url, requests(models), CLIENTS[-1], SECONDS, WARM_UP_SECONDS)
    return {load: share * most.images_per_second for load, share in RATES.items()}


def _pairs(title: str, ours: Side, theirs: Side, rates: dict[str, float]) -> Figures:
    """Results of every load: ours and, at once after it, theirs."""
    loads: dict[str, Callable[[Side], Result]] = {
        **{f"{clients}_clients": functools.partial(_closed, clients) for clients in CLIENTS},
        **{load: functools.partial(_open, rate) for load, rate in rates.items()},
    }
    pairs: Figures = {}
    for load, measured in loads.items():
        with paused(theirs.pids()):
            of_ours = measured(ours)
        with paused(ours.pids()):
            of_theirs = measured(theirs)
        pairs[load] = {"ours": of_ours.as_dict(), "theirs": of_theirs.as_dict()}
        say(f"{title}, {load}", **pairs[load])
    return pairs


def _closed(clients: int, side: Side) -> Result:
    return closed_loop(side.url, side.make, clients, SECONDS, WARM_UP_SECONDS)


def _open(rate: float, side: Side) -> Result:
    return open_loop(side.url, side.make, rate, OPEN_SECONDS, SEED)


def _by_server(windows: dict[str, Figures]) -> dict[str, Figures]:
    """Images a second and p95 of every server; of ours, the means over all of its windows."""

    def ours(scenario: str, load: str) -> Figures:
        pairs = [of[scenario][load]["ours"] for of in windows.values()]
        return {figure: fmean(of[figure] for of in pairs) for figure in SHOWN}

    return {
        OURS: {scenario: {load: ours(scenario, load) for load in LOADS} for scenario in SCENARIOS},
        **{
            name: {
                scenario: {load: of[scenario][load]["theirs"] for load in LOADS}
                for scenario in SCENARIOS
            }
            for name, of in windows.items()
        },
    }


def summary(windows: dict[str, Figures]) -> Figures:
    def ratio(name: str, scenario: str, load: str, figure: str) -> float:
        pair = windows[name][scenario][load]
        return float(pair["ours"][figure]) / float(pair["theirs"][figure])

    def speedup(opponents: Iterable[str], scenario: str, load: str) -> float:
        """Over the best of them."""
        return round(min(ratio(n, scenario, load, "images_per_second") for n in opponents), 2)

    p95_ratios = {
        f"{scenario} {load} {name}": ratio(name, scenario, load, "latency_p95")
        for name in OPPONENTS
        for scenario in SCENARIOS
        for load in LOADS
    }
    worst = max(p95_ratios, key=p95_ratios.__getitem__)
    return {
        "speedup_1_client": speedup([PLAIN], "one", "1_clients"),
        "speedup_16_clients": speedup([PLAIN], "one", "16_clients"),
        "speedup_1_client_best_dtype": speedup(BEST_PLAIN, "one", "1_clients"),
        "speedup_16_clients_best_dtype": speedup(BEST_PLAIN, "one", "16_clients"),
        "speedup_mix20_vs_best_peer": speedup(OPPONENTS, "mix20", "16_clients"),
        "p95_ratio_worst": round(p95_ratios[worst], 2),
        "p95_ratio_worst_where": worst,
        "failures": sum(
            side["failures"]
            for of in windows.values()
            for scenario in SCENARIOS
            for pair in of[scenario].values()
            for side in pair.values()
        ),
    }
