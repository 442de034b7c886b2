"""The README's tables of what it takes to lose something."""

import math
from typing import Any

from benchmarks.parts import Table

FAULTS = {
    "kills": "SIGKILL to one of four processes, {kills} times",
    "broker_disk": "Valkey's disk full for {outage_seconds:.0f} s",
    "store_disk": "the artifacts' disk full for {outage_seconds:.0f} s",
    "clock": "the clock an hour ahead for {outage_seconds:.0f} s",
    "network": "the network to Valkey cut for {outage_seconds:.0f} s",
    "memory": "the sampling worker killed by the kernel, out of memory",
}


def faults(result: dict[str, Any]) -> Table:
    table: Table = [
        (
            *("under load", "accepted", "lost", "twice", "corrupt", "answered 5xx"),
            *("well again after", "longest without an image"),
        )
    ]
    for name, what in FAULTS.items():
        part = result["parts"].get(name)
        if part is not None:
            seconds = part.get("longest_recovery_seconds", part.get("recovery_seconds"))
            counts = (part[c] for c in ("accepted", "lost", "duplicated", "corrupt"))
            told = (*(f"{count:,}" for count in counts), f"{part['answered_5xx']:,}")
            most = "at most " if name == "kills" else ""
            without = part["longest_without_an_image_seconds"]
            again = f"{most}{math.ceil(seconds)} s", f"{math.ceil(without)} s"
            table.append((what.format(**part), *told, *again))
    return table


def endurance(result: dict[str, Any]) -> Table:
    parts = result["parts"]
    table: Table = [("", "aim", "measured")]
    if fuzz := parts.get("fuzz"):
        told = f"{fuzz['fuzz_failures']} of {fuzz['fuzz_cases']:,}"
        table.append(("made-up requests answered 5xx, or not as the schema says", "0", told))
    if over := parts.get("overload"):
        asked = over["asked_requests_per_second"] / over["capacity_requests_per_second"]
        seconds = over["overload_seconds"]
        table += [
            (
                f"{asked:.0f} times what can be done, for {seconds} s: what is done",
                "≥ 90 %",
                f"{over['overload_goodput_share']:.0%}",
            ),
            (
                "… 95th percentile of what is accepted (without the crowd)",
                "bounded",
                f"{over['overload_accepted_p95_seconds']:.1f} s "
                f"({over['capacity_p95_seconds']:.1f} s)",
            ),
        ]
    if soak := parts.get("soak"):
        grown = f"{soak['soak_rss_growth_bytes'] / 1e6:+.1f} MB"
        files = f"{sum(soak['file_growth'].values()):+d} · {soak['redis_key_growth']:+d}"
        table += [
            (f"{soak['soak_minutes']} minutes of mixed load: memory of all processes", "±0", grown),
            ("… open files · Redis's keys", "±0", files),
        ]
    if registry := parts.get("registry"):
        models = registry["registry_models"]
        table.append(
            (
                f"Redis's data deleted: all {models} ready models sample again",
                "all",
                f"after {registry['registry_rebuild_seconds']:.0f} s; "
                f"everything is up after {registry['up_seconds']:.0f} s",
            )
        )
    return table
