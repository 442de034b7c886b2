"""The tables of what it takes to lose something."""

import math

from benchmarks.parts import Figures, Table, rows

FAULTS = {
    "kills": "SIGKILL to one of four processes, {kills} times",
    "broker_disk": "Valkey's disk full for {outage_seconds:.0f} s",
    "store_disk": "the artifacts' disk full for {outage_seconds:.0f} s",
    "clock": "the clock an hour ahead for {outage_seconds:.0f} s",
    "network": "the network to Valkey cut for {outage_seconds:.0f} s",
    "memory": "the sampling worker killed by the kernel, out of memory",
}


def faults(result: Figures) -> Table:
    table = rows(
        """under load | accepted | lost | twice | corrupt | answered 5xx \
            | well again after | longest without an image"""
    )
    for name, what in FAULTS.items():
        if part := result["parts"].get(name):
            seconds = part.get("longest_recovery_seconds", part.get("recovery_seconds"))
            most = "at most " if name == "kills" else ""
            table += rows(
                f"""{what.format(**part)}{_attacked(part)} \
                    | {part["accepted"]:,} | {part["lost"]:,} \
                    | {part["duplicated"]:,} | {part["corrupt"]:,} | {part["answered_5xx"]:,} \
                    | {most}{math.ceil(seconds)} s \
                    | {math.ceil(part["longest_without_an_image_seconds"])} s"""
            )
    return table


def endurance(result: Figures) -> Table:
    parts = result["parts"]
    table = rows("| aim | measured")
    if fuzz := parts.get("fuzz"):
        table += rows(
            f"""made-up requests answered 5xx, or not as the schema says | 0 \
                | {fuzz["fuzz_failures"]} of {fuzz["fuzz_cases"]:,}"""
        )
    if sent := parts.get("archives"):
        table += rows(
            f"""{sent["archives"]:,} mutated archives: crashes · growth of the service \
                | 0 · ≤ 64 MB | {sent["crashes"]} · {sent["resident_growth_bytes"] / 1e6:+.0f} MB
            … 95th percentile of others' plans, beside that without them | ≤ 2 times \
                | {sent["others_p95_ratio"]:g} times"""
        )
    if hostile := parts.get("hostile"):
        table += rows(
            f"""{hostile["hostile_clients"]} hostile clients: 95th percentile of honest images, \
                beside that without them | ≤ 2 times | {_told(hostile["hostile_p95_ratio"], 2)}"""
        )
    if over := parts.get("overload"):
        times = over["asked_requests_per_second"] / over["capacity_requests_per_second"]
        table += rows(
            f"""{times:.0f} times what can be done, for {over["overload_seconds"]} s: what is done \
                | ≥ 90 % | {over["overload_goodput_share"]:.0%}
            … 95th percentile of what is accepted (without the crowd) | bounded \
                | {over["overload_accepted_p95_seconds"]:.1f} s \
                ({over["capacity_p95_seconds"]:.1f} s)"""
        )
    if soak := parts.get("soak"):
        table += rows(
            f"""{soak["soak_minutes"]} minutes of mixed load{_attacked(soak)}: \
                memory of all processes | ±0 \
                | {soak["soak_rss_growth_bytes"] / 1e6:+.1f} MB
            … open files · Redis's keys | ±0 \
                | {sum(soak["file_growth"].values()):+d} · {soak["redis_key_growth"]:+d}"""
        )
    if registry := parts.get("registry"):
        table += rows(
            f"""Redis's data deleted: all {registry["registry_models"]} ready models sample again \
                | all | after {registry["registry_rebuild_seconds"]:.0f} s; \
                everything is up after {registry["up_seconds"]:.0f} s"""
        )
    return table


def _attacked(part: Figures) -> str:
    clients = part.get("hostile_clients", 0)
    return f", beside {clients} hostile clients" if clients else ""


def _told(ratio: float, most: float) -> str:
    return f"{ratio:g} times" if ratio <= most else f"**{ratio:g} times**, missed"
