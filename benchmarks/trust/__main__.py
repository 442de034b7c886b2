"""`python -m benchmarks.trust [PART …]`: what it takes to lose something; needs root."""

from collections.abc import Callable

from benchmarks.parts import Figures, run
from benchmarks.trust import archives, endurance, faults, fuzz, hostile
from benchmarks.trust.site import link_families

PARTS: dict[str, Callable[[], Figures]] = {
    "kills": faults.kills,
    "broker_disk": faults.full_broker_disk,
    "store_disk": faults.full_store_disk,
    "clock": faults.clock_jump,
    "network": faults.cut_network,
    "memory": faults.killed_for_memory,
    "fuzz": fuzz.measure,
    "fuzz_with_keys": fuzz.with_keys,
    "archives": archives.measure,
    "hostile": hostile.measure,
    "overload": endurance.overload,
    "soak": endurance.soak,
    "registry": endurance.lost_registry,
}
SUMMARY = {
    "kills": ("kills", "accepted", "lost", "duplicated", "corrupt"),
    "fuzz": ("fuzz_cases", "fuzz_failures"),
    "fuzz_with_keys": ("keys_fuzz_cases", "keys_fuzz_failures"),
    "archives": ("archives", "crashes", "resident_growth_bytes", "others_p95_ratio"),
    "hostile": ("hostile_p95_ratio",),
    "overload": ("overload_goodput_share",),
    "soak": ("soak_minutes", "soak_rss_growth_bytes"),
    "registry": ("registry_rebuild_seconds",),
}

if __name__ == "__main__":
    link_families()
    run("trust", PARTS, SUMMARY)
