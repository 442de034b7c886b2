"""The table of what goes in and out."""

from benchmarks.parts import Figures, Table, rows

STAGES = {
    "fit": "DiT-XL/2's shapes: {iterations} iterations of the fit",
    "assembly": "… assembly at half depth and half rank, bfloat16",
    "export": "… the same written out for diffusers, float32",
    "native": "… the same for `learngenes`",
}


def interop(result: Figures) -> Table:
    parts = result["parts"]
    table = rows("| aim | measured")
    if exports := parts.get("exports"):
        sizes = len(exports["sizes"])
        table += rows(
            f"""{sizes} sizes by plain diffusers: largest difference from the engine | ≤ 1e-3 \
                | {exports["export_max_abs_diff"]:.0e}
            … by onnxruntime | ≤ 1e-2 | {exports["onnx_max_abs_diff"]:.0e}"""
        )
    if clients := parts.get("clients"):
        same = "yes" if clients["openai_client_ok"] else "no"
        table += rows(f"`openai`, curl and `fineserve.Client`: the same images | yes | {same}")
    for task, few in parts.get("few_shot", {}).get("tasks", {}).items():
        table += rows(
            f"""a task, {task}, 50 images a class: FD before → after Σ (real images) | \
                | {few["fd_before"]:.0f} → {few["fd_after"]:.0f} \
                ({few["fd_of_real_images"]:.0f}), {few["seconds"]:.0f} s"""
        )
    for name, judged in parts.get("condensation", {}).get("judged", {}).items():
        told = f"{judged['loss']:.4f} · {judged['fd']:.0f}"
        table += rows(f"dense DiT, held-out loss · FD: {name} | | {told}")
    if latents := parts.get("latents"):
        table += rows(
            f"""latents: error of the autoencoder on unseen emoji, of 1 · PSNR | \
                | {latents["mean_absolute_error"]:.3f} · {latents["psnr_db"]:.0f} dB
            … {latents["images"]} images, {latents["steps"]} steps: denoising · decoding | \
                | {latents["denoising_seconds"]:.2f} · {latents["decoding_seconds"]:.2f} s"""
        )
    if shapes := parts.get("dit_xl"):
        for stage, what in STAGES.items():
            seconds, peak = (shapes["stages"][stage][f] for f in ("seconds", "peak_bytes"))
            told = f"{seconds:.1f} s · {peak / 1e9:.1f} GB"
            table += rows(f"{what.format(**shapes)}: time · peak memory | | {told}")
    return table
