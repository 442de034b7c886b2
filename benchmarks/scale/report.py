"""The tables of what many hosts do."""

from benchmarks.parts import Figures, Table, rows


def measured(result: Figures) -> Table:
    """What two hosts on one machine were seen to do."""
    parts = result["parts"]
    table = rows("| aim | measured")
    if kills := parts.get("kills"):
        table += rows(
            f"""{kills["kills"]} SIGKILLs over two hosts: lost · doubled · corrupt, of \
                {kills["accepted"]:,} accepted | 0 · 0 · 0 \
                | {kills["lost"]} · {kills["doubled"]} · {kills["corrupt"]}"""
        )
    if over := parts.get("failover"):
        table += rows(
            f"""the host that makes images is lost: until the other has begun them | \
                | {over["failover_seconds"]:g} s"""
        )
    if store := parts.get("store"):
        table += rows(
            f"""images a second of {store["clients"]} clients, artifacts in a bucket, \
                beside a directory | ≥ 0.9 times | {store["s3_over_directory"]:.2f} times
            POST /models to the first image, more than with a directory | ≤ 1 s \
                | {store["first_image_seconds_more"]:+.2f} s"""
        )
    if known := parts.get("constants"):
        table += rows(
            f"""Redis, for one request: commands · time of its one thread | \
                | {known["redis_commands_a_request"]:.0f} \
                · {1000 * known["cpu_seconds_a_request"]["redis"]:.1f} ms"""
        )
    if hosts := parts.get("hosts"):
        errors = hosts["errors"]
        table += rows(
            f"""two hosts, a core each, over one of them | | {hosts["two_hosts_over_one"]:.2f} times
            … as the simulation had said before: images a second · 95th percentile | ± 15 % \
                | {errors["images_per_second"]:+.0%} · {errors["latency_p95"]:+.0%}"""
        )
    return table


def simulated(result: Figures) -> Table:
    """What more hosts would do."""
    table = rows(
        """hosts | images a second | 95th percentile | Redis busy | cores for the API \
            | models loaded, of requests"""
    )
    for row in result["parts"].get("simulation", {}).get("hosts", []):
        table += rows(
            f"""{row["hosts"]} | {row["images_a_second"]:,.0f} | {row["latency_p95"]:.2f} s \
                | {row["redis_busy"]:.0%} | {row["api_cores"]:.1f} | {row["cold_share"]:.0%}"""
        )
    return table
