"""Checks 1, 5 and 6: images a second and latency of every server, for one model and for 20.

Every server runs alone, with the same weights, two threads, and the same requests. The plain
server is measured as it comes (float32, uncompiled) and at its best; the others at their best.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

from benchmarks.serving import latency
from benchmarks.serving.load import MakeRequest, closed_loop, open_loop
from benchmarks.serving.opponents import running
from benchmarks.serving.subjects import SEED, Figures, peer_requests, requests, say, served

CLIENTS = (1, 4, 16)
SECONDS = 8.0
WARM_UP_SECONDS = 2.0
OPEN_SECONDS = 10.0
RATES = {"poisson_low": 0.15, "poisson_high": 0.7}
"""Arrivals a second, of the images that fineserve makes for 16 clients. The low rate is one that
every server can bear; the high one is not."""
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


def measure() -> Figures:
    servers: dict[str, Figures] = {}
    with tempfile.TemporaryDirectory(prefix="fineserve-export-") as directory:
        with served() as ours:
            ours.export(Path(directory))
            alone = latency.measure(ours)
            mixes = {"one": [ours.one], "mix20": ours.mix}
            servers[OURS] = {
                scenario: _load(OURS, scenario, ours.url, requests(models), None)
                for scenario, models in mixes.items()
            }
        rates = {scenario: figures["rates"] for scenario, figures in servers[OURS].items()}
        for name, (server, dtype, compiled) in OPPONENTS.items():
            with running(server, Path(directory), dtype=dtype, compiled=compiled) as url:
                servers[name] = {
                    scenario: _load(
                        name, scenario, url, peer_requests(server, models), rates[scenario]
                    )
                    for scenario, models in mixes.items()
                }
    return {"servers": servers, **alone, **summary(servers)}


def _load(name: str, scenario: str, url: str, make: MakeRequest, rates: Figures | None) -> Figures:
    """Every load in turn; `rates` by ours where there are none yet."""
    figures: Figures = {}
    for clients in CLIENTS:
        load = f"{clients}_clients"
        figures[load] = closed_loop(url, make, clients, SECONDS, WARM_UP_SECONDS).as_dict()
        say(f"{name}, {scenario}, {load}", figures[load])
    most = figures[f"{CLIENTS[-1]}_clients"]["images_per_second"]
    figures["rates"] = rates or {load: share * most for load, share in RATES.items()}
    for load, rate in figures["rates"].items():
        figures[load] = open_loop(url, make, rate, OPEN_SECONDS, SEED).as_dict()
        say(f"{name}, {scenario}, {load}", figures[load])
    return figures


def summary(servers: dict[str, Figures]) -> Figures:
    loads = [*(f"{clients}_clients" for clients in CLIENTS), *RATES]

    def speed(name: str, scenario: str, load: str) -> float:
        return float(servers[name][scenario][load]["images_per_second"])

    def speedup(opponents: Iterable[str], scenario: str, load: str) -> float:
        best = max(speed(name, scenario, load) for name in opponents)
        return round(speed(OURS, scenario, load) / best, 2)

    p95_ratios = {
        f"{scenario} {load} {name}": servers[OURS][scenario][load]["latency_p95"]
        / servers[name][scenario][load]["latency_p95"]
        for name in OPPONENTS
        for scenario in servers[OURS]
        for load in loads
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
            figures[load]["failures"]
            for scenarios in servers.values()
            for figures in scenarios.values()
            for load in loads
        ),
    }
