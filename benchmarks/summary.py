"""What the README shows of benchmarks/results: an answer, and a line for each main figure."""

import json

from benchmarks.parts import Figures, Table, rows


def summary(results: dict[str, Figures]) -> Table:
    """The main figures, each with the command that measures it, whether or not it meets its aim."""
    main, sizing, serving, trust, paper, interop = (
        results[name]["summary"]
        for name in ("main_job", "sizing", "serving", "trust", "paper", "interop")
    )
    start = results["start"]["summary"]
    again, longest = start["recovery_median_seconds"], start["recovery_worst_seconds"]
    promise = start["promise_error_median"]
    real = results["main_job"]["figures"]["class_accuracy_real_test_set"]
    resident = results["serving"]["parts"]["density"]["resident_bytes"]
    ours, theirs = (resident[way]["100"] / 1e6 for way in ("engine", "pipelines"))
    memory, worst = sizing["memory_error_median"], sizing["memory_error_max"]
    within = sizing["latency_within_budget_share"]
    one, many = serving["speedup_16_clients"], serving["speedup_mix20_vs_best_peer"]
    peak = serving["gemm_peak_share"]
    lost = [trust[what] for what in ("lost", "duplicated", "corrupt")]
    wins, cells = paper["table1_wins"], paper["table1_rows"]
    form, gap = results["form"]["summary"], results["healing"]["summary"]["healed_4bit_gap"]
    full, fourth = form["full_loss_over_dense"], form["l4_loss_over_shipped"]
    half = results["importing"]["summary"]["half_depth_fd_over_pruned"]
    condensed, pruned = interop["condense_half_depth_fd"], interop["prune_half_depth_fd"]
    return rows(
        f"""| aim | measured | by
        to install · from there to the first image | · ≤ 20 s \
            | {start["install_seconds"]:.0f} · {start["first_image_seconds"]:.0f} s \
            | `make bench-start`
        a sampling worker is killed: to the next image, median (worst) | ≤ 10 s (≤ 20 s) \
            | {_judged(f"{again:.1f} s ({longest:.1f} s)", again <= 10 and longest <= 20)} \
            | `make bench-start`
        served beside measured latency: median error | ≤ 10% \
            | {_judged(f"{promise:.1%}", promise <= 0.1)} | `make bench-start`
        budget to the first image · to `ready` | \
            | {main["first_image_seconds"]:.1f} · {main["ready_seconds"]:.0f} s \
            | `make bench-main-job`
        a classifier finds the class asked for (in real images) | \
            | {main["class_accuracy"]:.1%} ({real:.1%}) | `make bench-main-job`
        memory, predicted beside measured: median (worst) error | ≤ 2% (≤ 5%) \
            | {_judged(f"{memory:.2%} ({worst:.2%})", memory <= 0.02 and worst <= 0.05)} \
            | `make bench-sizing`
        latency budgets kept | ≥ 95% | {_judged(f"{within:.1%}", within >= 0.95)} \
            | `make bench-sizing`
        images a second over plain diffusers in float32, 16 clients | ≥ 4 times \
            | {_judged(f"{one:.2f} times", one >= 4)} | `make bench-serving`
        20 models at once, over the best other server | ≥ 2 times \
            | {_judged(f"{many:.2f} times", many >= 2)} | `make bench-serving`
        share of the GEMM peak in a full batch | ≥ 60% | {_judged(f"{peak:.0%}", peak >= 0.6)} \
            | `make bench-serving`
        100 models in memory · as pipelines | | {ours:.0f} · {theirs:.0f} MB \
            | `make bench-serving`
        {trust["kills"]} kills under load: of {trust["accepted"]:,} accepted, \
            lost · twice · corrupt | 0 · 0 · 0 \
            | {_judged(" · ".join(map(str, lost)), not any(lost))} | `make bench-trust`
        the paper's comparison at equal cost: FINE is the best in | most \
            | {_judged(f"{wins} of {cells} cells", 2 * wins > cells)} | `make paper`
        held-out loss of the full size, over a dense network's | ≤ 1.03 \
            | {_judged(f"{full:.3f}", full <= 1.03)} | `make bench-form`
        … of a third of its layers, over what was shipped before | ≤ 0.96 \
            | {_judged(f"{fourth:.3f}", fourth <= 0.96)} | `make bench-form`
        U and V in 4 bits, Σ healed: held-out loss lost | ≤ 0.002 \
            | {_judged(f"{gap:.4f}", gap <= 0.002)} | `make bench-healing`
        an imported DiT at half its depth after five minutes: FD over pruned, at its best | ≤ 1 \
            | {_judged(f"{half:.2f}", half <= 1)} | `make bench-import`
        a DiT condensed to half its depth: FD (pruned) | ≤ pruned \
            | {_judged(f"{condensed:.0f} ({pruned:.0f})", condensed <= pruned)} \
            | `make bench-interop`"""
    )


def answer(main_job: Figures) -> str:
    """The record of the main job's model, `ready`, without what was not kept of it."""
    figures = main_job["figures"]
    depth, rank, mode = figures["sizes"][-1].split()
    predicted, measured = (_shown(figures[which]) for which in ("predicted", "measured"))
    return f"""```json
{{"id": "m-…", "status": "ready",
 "plan": {{"depth": {depth[1:]}, "rank": {rank[1:]}, "mode": "{mode}", "…": "…",
          "predicted": {predicted}}},
 "measured": {measured}, "…": "…"}}
```
"""


def _shown(cost: Figures) -> str:
    names = ("memory_bytes", "latency_p95_seconds")
    return json.dumps({name: round(cost[name], 3) for name in names})


def _judged(measured: str, met: bool) -> str:
    return measured if met else f"**{measured}**, missed"
