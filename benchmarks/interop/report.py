"""The README's table of what goes in and out."""

from typing import Any

from benchmarks.parts import Table


def interop(result: dict[str, Any]) -> Table:
    parts = result["parts"]
    table: Table = [("", "aim", "measured")]
    if exports := parts.get("exports"):
        sizes = len(exports["sizes"])
        table += [
            (
                f"{sizes} sizes by plain diffusers: largest difference from the engine",
                "≤ 1e-3",
                f"{exports['export_max_abs_diff']:.0e}",
            ),
            ("… by onnxruntime", "≤ 1e-2", f"{exports['onnx_max_abs_diff']:.0e}"),
        ]
    if clients := parts.get("clients"):
        same = "yes" if clients["openai_client_ok"] else "no"
        table.append(("`openai`, curl and `fineserve.Client`: the same images", "yes", same))
    if few := parts.get("few_shot"):
        for task, figures in few["tasks"].items():
            table.append(
                (
                    f"a task, {task}, 50 images a class: FD before → after Σ (real images)",
                    "",
                    f"{figures['fd_before']:.0f} → {figures['fd_after']:.0f} "
                    f"({figures['fd_of_real_images']:.0f}), {figures['seconds']:.0f} s",
                )
            )
    if condensed := parts.get("condensation"):
        for name, judged in condensed["judged"].items():
            told = f"{judged['loss']:.4f} · {judged['fd']:.0f}"
            table.append((f"dense DiT, held-out loss · FD: {name}", "", told))
    if latents := parts.get("latents"):
        table += [
            (
                "latents: error of the autoencoder on unseen emoji, of 1 · PSNR",
                "",
                f"{latents['mean_absolute_error']:.3f} · {latents['psnr_db']:.0f} dB",
            ),
            (
                f"… {latents['images']} images, {latents['steps']} steps: denoising · decoding",
                "",
                f"{latents['denoising_seconds']:.2f} · {latents['decoding_seconds']:.2f} s",
            ),
        ]
    if shapes := parts.get("dit_xl"):
        for stage, what in (
            ("fit", f"DiT-XL/2's shapes: {shapes['iterations']} iterations of the fit"),
            ("assembly", "… assembly at half depth and half rank, bfloat16"),
            ("export", "… the same written out for diffusers, float32"),
            ("native", "… the same for `learngenes`"),
        ):
            figures = shapes["stages"][stage]
            peak = f"{figures['peak_bytes'] / 1e9:.1f} GB"
            table.append(
                (f"{what}: time · peak memory", "", f"{figures['seconds']:.1f} s · {peak}")
            )
    return table
