"""`python -m benchmarks.interop [PART …]`: other people's models, images and clients."""

from collections.abc import Callable

from benchmarks.interop import clients, condensation, exports, few_shot, latents, shapes
from benchmarks.parts import Figures, run

PARTS: dict[str, Callable[[], Figures]] = {
    "exports": exports.measure,
    "clients": clients.measure,
    "few_shot": few_shot.measure,
    "condensation": condensation.measure,
    "latents": latents.measure,
    "dit_xl": shapes.measure,
}
SUMMARY = {
    "exports": ("export_max_abs_diff", "onnx_max_abs_diff"),
    "condensation": ("condense_loss_gap", "condense_half_depth_fd", "prune_half_depth_fd"),
    "clients": ("openai_client_ok",),
    "few_shot": ("few_shot_fd_before", "few_shot_fd_after", "few_shot_seconds"),
    "dit_xl": ("dit_xl_condense_seconds",),
}

if __name__ == "__main__":
    run("interop", PARTS, SUMMARY)
