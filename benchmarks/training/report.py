"""The table of how quickly a family is trained."""

from benchmarks.parts import Figures, Table, rows


def training(result: Figures) -> Table:
    speed = result["parts"]["speed"]
    at, losses = speed["images_per_second"], speed["heldout_loss"]
    before, now = (next(iter(losses[when].values())) for when in ("before", "now"))
    loss = f"{now:.4f}" if now <= before + 0.001 else f"**{now:.4f}**, missed"
    once = speed["compiling_and_ordering_seconds"]
    return rows(
        f"""| aim | 7f885ee | now | ratio
        images a second, one depth first | | {at["before"]:.0f} \
            | {at["now, one depth first"]:.0f} | {at["now, one depth first"] / at["before"]:.2f}
        … all depths late | | {at["before"]:.0f} | {at["now, all depths late"]:.0f} \
            | {at["now, all depths late"] / at["before"]:.2f}
        … a whole training, and {once:.0f} s of compiling and ordering layers | ≥ 2 \
            | {at["before"]:.0f} | {at["now, of a whole training"]:.0f} \
            | {speed["images_per_second_over_before"]:.2f}
        … at either commit the full size alone | | {at["before, one depth"]:.0f} \
            | {at["now, one depth"]:.0f} | {speed["over_before_at_one_depth"]:.2f}
        held-out loss of the full size after {speed["images"]:,} images | + 0.001 | {before:.4f} \
            | {loss} | {now / before:.3f}
        share of the time that its products take at their best | | \
            | {speed["gemm_peak_share"]:.0%} | """
    )
