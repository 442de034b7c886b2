"""benchmarks/results/scale.png: how far hosts go, and half of twenty lost for a minute."""

import matplotlib as mpl

from benchmarks.parts import RESULTS, Figures

mpl.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.ticker import StrMethodFormatter

OURS = "crimson"


def plot(simulated: Figures) -> None:
    """`simulated` as the part `simulation` gives it."""
    figure, (rates, latencies, region) = plt.subplots(1, 3, figsize=(13, 3.8), layout="constrained")
    hosts = [row["hosts"] for row in simulated["hosts"]]

    def column(name: str) -> list[float]:
        return [row[name] for row in simulated["hosts"]]

    rates.plot(hosts, column("offered_a_second"), "--", color="grey", label="asked for")
    rates.plot(hosts, column("images_a_second"), "o-", color=OURS, label="made")
    rates.set(title="images a second", xlabel="hosts")
    rates.legend(frameon=False)
    latencies.plot(hosts, column("latency_p95"), "o-", color=OURS)
    latencies.set(title="95th percentile, seconds", xlabel="hosts")
    for axis in (rates, latencies):
        axis.set(xscale="log", yscale="log")
        axis.set_xticks(hosts[::2], [str(each) for each in hosts[::2]])
        axis.minorticks_off()
        axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    lost = simulated["lost_region"]
    region.plot(lost["latency_p95"], color=OURS)
    region.axvspan(lost["lost_at"], lost["back_at"], color="grey", alpha=0.2, linewidth=0)
    region.set(
        title=f"half of {lost['hosts']} hosts away: 95th percentile, seconds", xlabel="second"
    )
    for axis in (rates, latencies, region):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.3)
    figure.savefig(RESULTS / "scale.png", dpi=90)
    plt.close(figure)
