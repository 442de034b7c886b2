"""The tables of this beside other servers."""

from benchmarks.parts import Figures, Table, rows


def serving(result: Figures) -> Table:
    table = rows(
        """25 steps, guided | 1 client | 4 clients | 16 clients | p95, 16 clients \
            | 20 models, 16 clients | p95 | p95 at few · many arrivals"""
    )
    for name, loads in result["parts"]["throughput"]["servers"].items():
        one, mix = loads["one"], loads["mix20"]
        speeds = [one[f"{clients}_clients"]["images_per_second"] for clients in (1, 4, 16)]
        table += rows(
            f"""{name} | {" | ".join(f"{speed:.1f}" for speed in speeds)} \
                | {one["16_clients"]["latency_p95"]:.2f} s \
                | {mix["16_clients"]["images_per_second"]:.1f} \
                | {mix["16_clients"]["latency_p95"]:.2f} s \
                | {mix["poisson_low"]["latency_p95"]:.2f} s \
                · {mix["poisson_high"]["latency_p95"]:.2f} s"""
        )
    return table


def serving_aims(result: Figures) -> Table:
    s, parts = result["summary"], result["parts"]
    throughput, density, requests = parts["throughput"], parts["density"], parts["correctness"]
    wide = parts["roofline"]["of"]["wide bfloat16"]["gemm_peak_share"]
    ours, pipelines = (density["resident_bytes"][side] for side in ("engine", "pipelines"))
    resident = "\n".join(
        f"""resident, number of models {count}: here · as pipelines | \
            | {ours[count] / 1e6:.0f} · {pipelines[count] / 1e6:.0f} MB"""
        for count in ours
    )
    return rows(
        f"""| aim | measured
        images/s over plain float32, 1 client | ≥ 1.5 times | {s["speedup_1_client"]:.2f} times
        … 16 clients | ≥ 4 times | {s["speedup_16_clients"]:.2f} times
        … at its best dtype, 1 client | ≥ 1.3 times | {s["speedup_1_client_best_dtype"]:.2f} times
        … at its best dtype, 16 clients | ≥ 2.5 times \
            | {s["speedup_16_clients_best_dtype"]:.2f} times
        20 models over the best of all others, 16 clients | ≥ 2 times \
            | {s["speedup_mix20_vs_best_peer"]:.2f} times
        p95 over another server's, the worst of all loads \
            ({throughput["p95_ratio_worst_where"]}) | ≤ 1 | {s["p95_ratio_worst"]:.2f}
        share of the GEMM peak in a full batch, width 128 | ≥ 60 % | {s["gemm_peak_share"]:.0%}
        … width 384, as DiT-S/2 | ≥ 60 % | {wide:.0%}
        {resident}
        100 models mixed, over one model's images/s | ≥ 85 % | {s["mix100_throughput_ratio"]:.0%}
        of {requests["requests"]:,} random mixed requests, unlike their solo run | 0 \
            | {s["solo_vs_batch_mismatches"]}
        HTTP and queue, over bare sampling: p50 · p95 | ≤ 10 · 25 ms \
            | {s["overhead_p50_seconds"] * 1e3:.1f} · {s["overhead_p95_seconds"] * 1e3:.1f} ms
        10 steps behind ten requests of 200 steps · alone | \
            | {throughput["short_behind_long_seconds"]:.2f} \
            · {throughput["short_alone_seconds"]:.2f} s"""
    )
