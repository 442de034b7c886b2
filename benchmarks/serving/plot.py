"""benchmarks/results/serving.png: images a second and latency of every server."""

from typing import Any

import matplotlib as mpl

from benchmarks.parts import RESULTS, Figures

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import StrMethodFormatter

TITLES = {"one": "one model", "mix20": "20 models mixed"}
LOADS = {
    "1_clients": "1 client",
    "4_clients": "4",
    "16_clients": "16",
    "poisson_low": "few\narrivals",
    "poisson_high": "many\narrivals",
}
CLOSED = 3
"""So many of them are closed loops: only of those does a server decide how many images it makes."""


def plot(servers: dict[str, Figures]) -> None:
    """`servers` as the part `throughput` gives them; ours first."""
    figure, rows = plt.subplots(2, 2, figsize=(11, 6.4), layout="constrained", sharex="col")
    colours = ["crimson", *(str(0.3 + 0.09 * i) for i in range(len(servers) - 1))]
    for axes, (scenario, title) in zip(rows, TITLES.items(), strict=True):
        for position, (colour, (name, loads)) in enumerate(
            zip(colours, servers.items(), strict=True)
        ):
            of = [loads[scenario][load] for load in LOADS]
            shift = (position - (len(servers) - 1) / 2) * 0.12
            speeds = [figures["images_per_second"] for figures in of[:CLOSED]]
            _bars(axes[0], shift, speeds, label=name, color=colour)
            _bars(axes[1], shift, [figures["latency_p95"] for figures in of], color=colour)
        axes[0].set_ylabel(f"{title}\nimages a second")
        axes[1].set_ylabel("p95 latency, seconds")
        axes[1].set_yscale("log")
        axes[1].yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    labels = list(LOADS.values())
    rows[1][0].set_xticks(range(CLOSED), ["1 client", "4 clients", "16 clients"])
    rows[1][1].set_xticks(range(len(labels)), labels)
    for axis in rows.flat:
        axis.spines[["top", "right"]].set_visible(False)
    rows[0][0].legend(fontsize=8, frameon=False, loc="upper left")
    figure.savefig(RESULTS / "serving.png", dpi=90)
    plt.close(figure)


def _bars(axes: Any, shift: float, heights: list[float], **style: Any) -> None:
    axes.bar([place + shift for place in range(len(heights))], heights, 0.11, **style)
