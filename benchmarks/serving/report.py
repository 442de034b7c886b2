"""The tables of this beside other servers."""

from typing import Any

from benchmarks.parts import Table

POISSON = ("poisson_low", "poisson_high")


def serving(result: dict[str, Any]) -> Table:
    table: Table = [
        (
            "25 steps, guided",
            "1 client",
            "4 clients",
            "16 clients",
            "p95, 16 clients",
            "20 models, 16 clients",
            "p95",
            "p95 at few · many arrivals",
        )
    ]
    for name, loads in result["parts"]["throughput"]["servers"].items():
        one, mix = loads["one"], loads["mix20"]
        table.append(
            (
                name,
                *(
                    f"{one[f'{clients}_clients']['images_per_second']:.1f}"
                    for clients in (1, 4, 16)
                ),
                f"{one['16_clients']['latency_p95']:.2f} s",
                f"{mix['16_clients']['images_per_second']:.1f}",
                f"{mix['16_clients']['latency_p95']:.2f} s",
                " · ".join(f"{mix[load]['latency_p95']:.2f} s" for load in POISSON),
            )
        )
    return table


def serving_aims(result: dict[str, Any]) -> Table:
    s, parts = result["summary"], result["parts"]
    throughput, density = parts["throughput"], parts["density"]
    wide = parts["roofline"]["of"]["wide bfloat16"]["gemm_peak_share"]
    resident = density["resident_bytes"]
    megabytes = {side: {n: b / 1e6 for n, b in held.items()} for side, held in resident.items()}

    def times(aim: str, value: float) -> tuple[str, str]:
        return f"≥ {aim} times", f"{value:.2f} times"

    def held(count: str) -> str:
        return f"{megabytes['engine'][count]:.0f} · {megabytes['pipelines'][count]:.0f} MB"

    return [
        ("", "aim", "measured"),
        ("images/s over plain float32, 1 client", *times("1.5", s["speedup_1_client"])),
        ("… 16 clients", *times("4", s["speedup_16_clients"])),
        ("… at its best dtype, 1 client", *times("1.3", s["speedup_1_client_best_dtype"])),
        ("… at its best dtype, 16 clients", *times("2.5", s["speedup_16_clients_best_dtype"])),
        (
            "20 models over the best of all others, 16 clients",
            *times("2", s["speedup_mix20_vs_best_peer"]),
        ),
        (
            "p95 over another server's, the worst of all loads "
            f"({throughput['p95_ratio_worst_where']})",
            "≤ 1",
            f"{s['p95_ratio_worst']:.2f}",
        ),
        (
            "share of the GEMM peak in a full batch, width 128",
            "≥ 60 %",
            f"{s['gemm_peak_share']:.0%}",
        ),
        ("… width 384, as DiT-S/2", "≥ 60 %", f"{wide:.0%}"),
        *(
            (f"resident, number of models {count}: here · as pipelines", "", held(count))
            for count in resident["engine"]
        ),
        (
            "100 models mixed, over one model's images/s",
            "≥ 85 %",
            f"{s['mix100_throughput_ratio']:.0%}",
        ),
        (
            f"of {parts['correctness']['requests']:,} random mixed requests, unlike their solo run",
            "0",
            str(s["solo_vs_batch_mismatches"]),
        ),
        (
            "HTTP and queue, over bare sampling: p50 · p95",
            "≤ 10 · 25 ms",
            f"{s['overhead_p50_seconds'] * 1e3:.1f} · {s['overhead_p95_seconds'] * 1e3:.1f} ms",
        ),
        (
            "10 steps behind ten requests of 200 steps · alone",
            "",
            f"{throughput['short_behind_long_seconds']:.2f} · "
            f"{throughput['short_alone_seconds']:.2f} s",
        ),
    ]
