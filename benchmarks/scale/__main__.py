"""`python -m benchmarks.scale [PART …]`: benchmarks/results/scale.json."""

from benchmarks.parts import run
from benchmarks.scale import faults, hosts, simulation
from benchmarks.scale.plot import plot
from benchmarks.trust.site import link_families

PARTS = {
    "store": hosts.bucket_over_directory,
    "constants": hosts.constants,
    "prediction": simulation.prediction,
    "hosts": hosts.two_over_one,
    "kills": faults.kills,
    "failover": faults.failover,
    "simulation": simulation.beyond,
}
SUMMARY = {
    "kills": ("lost", "doubled", "corrupt"),
    "failover": ("failover_seconds",),
    "store": ("s3_over_directory", "first_image_seconds_more"),
    "hosts": ("two_hosts_over_one", "simulation_error"),
    "simulation": ("simulated_hosts", "saturates_first"),
}

if __name__ == "__main__":
    link_families()
    parts = run("scale", PARTS, SUMMARY)
    if "simulation" in parts:
        plot(parts["simulation"])
