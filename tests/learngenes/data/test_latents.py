"""Families of latents: an autoencoder stands between what is denoised and what is seen."""

import json
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, DiTPipeline

from learngenes.config import DType, Mode, NetworkConfig, Size
from learngenes.data.labelled import LabelledImages
from learngenes.data.latents import (
    AutoencoderError,
    LatentEncoder,
    joined,
    read_autoencoder,
    to_pixels,
)
from learngenes.family.family import ENCODER, Family, FamilyError, load_family
from learngenes.formats.diffusers import export_model
from learngenes.formats.native import load_model, save_model
from learngenes.formats.onnx import export_in_process
from learngenes.measuring.device import execution_on, measure_profile
from learngenes.measuring.model import memory, parameter_bytes
from learngenes.model.sampling import initial_noise, sample
from learngenes.model.sigma import interpolated
from learngenes.sizing.budget import Workload
from learngenes.sizing.cost import memory_bytes, shared_bytes, weight_bytes
from learngenes.training.calibrate import calibrate
from learngenes.training.condense import condense
from learngenes.training.new_family import pretrain_family
from learngenes.training.retrain import RetrainingConfig, retrain
from tests.learngenes.training.test_condense import CONFIG as CONDENSED
from tests.support.sizing import NETWORK
from tests.support.trainings import image_folder, under, write_config

CPU = torch.device("cpu")
LATENTS = NETWORK.model_copy(update={"sample_size": 4, "in_channels": 2, "patch_size": 1})
CONFIG = {
    "name": "latents",
    **under("network", sample_size=4, in_channels=2, patch_size=1, num_classes=5),
    **under("network", width=32, num_attention_heads=4, depth=4, rank=48),
    **under("sizes", depths=[2, 3, 4], ranks=[8, 48]),
    **under("training", steps=4, batch_size=8, checkpoint_every_steps=2),
}


def autoencoder(**changes: object) -> AutoencoderKL:
    torch.manual_seed(0)
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "latent_channels": 2,
        "norm_num_groups": 4,
        "sample_size": 8,
        "scaling_factor": 0.5,
    }
    return AutoencoderKL(**{**config, **changes}).eval()


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    autoencoder().save_pretrained(tmp_path / "autoencoder")
    return tmp_path / "autoencoder"


@pytest.fixture
def latent_family(directory: Path, limited_data: LabelledImages, tmp_path: Path) -> Family:
    images, stated = tmp_path / "images", {**CONFIG, "autoencoder": str(directory)}
    config = write_config(tmp_path / "config.toml", image_folder(limited_data, images), stated)
    return pretrain_family(config, tmp_path / "work", tmp_path / "families" / "latents")


@torch.inference_mode()
def test_both_halves_are_those_of_diffusers(directory: Path, limited_data: LabelledImages) -> None:
    network, encoder, decoder = read_autoencoder(directory, LATENTS)
    assert (network.image_size, network.image_channels) == (8, 3)
    whole = autoencoder()
    images = limited_data.normalised(torch.arange(40))
    latents = whole.encode(images).latent_dist.mean * 0.5
    encoded = encoder.encoded(limited_data.subset(torch.arange(40)))
    torch.testing.assert_close(encoded.normalised(torch.arange(40)), latents, atol=2e-3, rtol=0)
    assert torch.equal(encoded.labels, limited_data.labels[:40])
    expected = to_pixels(whole.decode(latents / 0.5).sample)
    assert (decoder.pixels(latents).int() - expected.int()).abs().max() <= 1
    again = joined(network, encoder, decoder).state_dict()
    assert all(torch.equal(again[name], tensor) for name, tensor in whole.state_dict().items())


def test_what_no_family_can_have_is_refused(tmp_path: Path) -> None:
    def refusal(network: NetworkConfig, **changes: object) -> str:
        autoencoder(**changes).save_pretrained(tmp_path / "vae")
        with pytest.raises(AutoencoderError) as refused:
            read_autoencoder(tmp_path / "vae", network)
        return str(refused.value)

    assert "latents of 2 channels; the network's in_channels is 3" in refusal(NETWORK)
    assert "its shift_factor is 0.1, not None" in refusal(LATENTS, shift_factor=0.1)
    assert "its out_channels is 1, not 3" in refusal(LATENTS, out_channels=1)
    with pytest.raises(AutoencoderError, match="is not an AutoencoderKL"):
        read_autoencoder(tmp_path, LATENTS)


def test_a_family_is_trained_on_latents(latent_family: Family, tmp_path: Path) -> None:
    manifest = latent_family.manifest
    assert manifest.network.image_size == 8
    assert latent_family.limited_data.images.shape[1:] == (2, 4, 4)
    assert latent_family.limited_data.images.dtype == torch.float16
    model = latent_family.assemble(latent_family.scales, Mode.MATERIALISED)
    images = sample(model, manifest.diffusion, [0, 1], [0, 1], num_inference_steps=2)
    assert (images.shape, images.dtype) == ((2, 3, 8, 8), torch.uint8)
    trained = read_autoencoder(tmp_path / "autoencoder", LATENTS)[2].state_dict()
    assert latent_family.stem.decoder is not None
    kept = latent_family.stem.decoder.state_dict()  # it is not what is trained
    torch.testing.assert_close(kept, trained, atol=0, rtol=0)


def test_what_has_been_encoded_is_found_again(
    directory: Path, limited_data: LabelledImages, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = read_autoencoder(directory, LATENTS)[1]
    some, others = (limited_data.subset(torch.arange(at, at + 40)) for at in (0, 40))
    first = encoder.encoded_once(some, tmp_path)
    with monkeypatch.context() as changed:
        changed.setattr(LatentEncoder, "encoded", lambda *_: pytest.fail("encoded again"))
        again = encoder.encoded_once(some, tmp_path)
    assert torch.equal(first.images, again.images)
    assert torch.equal(again.labels, some.labels)
    assert not torch.equal(encoder.encoded_once(others, tmp_path).images, first.images)
    with torch.no_grad():
        encoder.quant_conv.bias += 1  # another encoder
    assert not torch.equal(encoder.encoded_once(some, tmp_path).images, first.images)


def test_a_family_without_its_encoder_is_refused(latent_family: Family, tmp_path: Path) -> None:
    file = tmp_path / "families" / "latents" / "family.json"
    manifest = json.loads(file.read_text())
    del manifest["sha256"][f"{ENCODER}.safetensors"]
    file.write_text(json.dumps(manifest))
    with pytest.raises(FamilyError, match=r"no hash for encoder\.safetensors"):
        load_family(file.parent)


def test_sigma_is_retrained_on_latents(latent_family: Family, limited_data: LabelledImages) -> None:
    config = RetrainingConfig(steps=20, learning_rate=1e-2, heldout_every_steps=5)
    for data in (None, latent_family.encoded(limited_data)):
        scales = interpolated(latent_family.scales, Size(depth=2, rank=8))
        result = retrain(latent_family, scales, config, data=data)
        assert result.heldout_loss < result.initial_heldout_loss
    table = calibrate(latent_family, RetrainingConfig(steps=2), points=2)
    assert len(table.depths) == 2


@pytest.mark.parametrize("dtype", list(DType))
def test_what_decoding_needs_is_predicted(latent_family: Family, dtype: DType) -> None:
    network, diffusion = latent_family.manifest.network, latent_family.manifest.diffusion
    size = Size(depth=2, rank=8)
    model = latent_family.assemble(interpolated(latent_family.scales, size), Mode.FACTORED, dtype)
    execution = execution_on(CPU, Mode.FACTORED, dtype)
    positions = latent_family.stem.positions.numel() * execution.compute_bytes
    weights = int(weight_bytes(network, 2, 8, execution))
    assert parameter_bytes(model) == pytest.approx(weights, abs=positions)
    for n in (1, 3, 9):
        workload = Workload.of(n=n, guidance_scale=1)
        predicted = int(memory_bytes(network, 2, 8, execution, workload))
        measured = memory(model, diffusion, workload)
        assert 0.85 < measured / predicted <= 1.02
    assert network.autoencoder is not None
    decoder = network.autoencoder.decoder_parameters * 4
    assert shared_bytes(network, np.array(8), execution) >= decoder


def test_decoding_takes_time_for_each_image(
    latent_family: Family, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pixels(_: object, latents: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return torch.zeros(len(latents), 3, 8, 8, dtype=torch.uint8)

    monkeypatch.setattr("learngenes.data.latents.LatentDecoder.pixels", pixels)
    profile = measure_profile(latent_family, 0, max_seconds=0.1)
    assert 0.02 <= profile.image_seconds < 0.05
    execution = profile.executions[0]
    undecoded = profile.model_copy(update={"image_seconds": 0})
    four, less = (
        float(each.latency_seconds(2, 8, execution, Workload.of(4)))
        for each in (profile, undecoded)
    )
    assert four - less == pytest.approx(4 * profile.image_seconds)


def test_a_pipeline_of_diffusers_samples_the_same_images(
    latent_family: Family, tmp_path: Path
) -> None:
    export_model(latent_family, latent_family.scales, tmp_path / "export")
    pipeline = DiTPipeline.from_pretrained(tmp_path / "export")
    pipeline.set_progress_bar_config(disable=True)
    names = [name for name, _ in sorted(pipeline.labels.items(), key=lambda item: item[1])]
    assert names == list(latent_family.manifest.class_names)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    how = {"guidance_scale": 2.0, "num_inference_steps": 3, "output_type": "np"}
    theirs = pipeline(pipeline.get_label_ids(names[:2]), generator=generators, **how).images
    model = latent_family.assemble(latent_family.scales, Mode.MATERIALISED)
    ours = sample(model, latent_family.manifest.diffusion, [0, 1], [3, 4], num_inference_steps=3)
    difference = ours.permute(0, 2, 3, 1).numpy() - 255 * np.asarray(theirs)
    assert np.abs(difference).max() <= 1
    assert initial_noise(latent_family.manifest.network, [3]).shape == (1, 2, 4, 4)


@torch.inference_mode()
def test_a_model_that_leaves_takes_its_decoder_along(latent_family: Family, tmp_path: Path) -> None:
    names = latent_family.manifest.class_names
    own, factored = latent_family.scales, Mode.FACTORED
    save_model(tmp_path / "out", latent_family, own, factored, DType.FLOAT32, names, whole=True)
    x = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    loaded = load_model(tmp_path / "out").network.stem.pixels(x)
    assert torch.equal(loaded, latent_family.stem.pixels(x))
    assert isinstance(latent_family.encoder, LatentEncoder)


@torch.inference_mode()
def test_onnx_has_a_decoder_too(latent_family: Family, tmp_path: Path) -> None:
    export_in_process(latent_family, latent_family.scales, tmp_path)
    session = onnxruntime.InferenceSession(tmp_path / "decoder.onnx")
    latents = torch.randn(3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    (images,) = session.run(None, {"latents": latents.numpy()})
    ours = latent_family.stem.pixels(latents).int()
    assert (to_pixels(torch.from_numpy(images)).int() - ours).abs().max() <= 1


def test_a_latent_teacher_is_condensed(
    latent_family: Family, limited_data: LabelledImages, tmp_path: Path
) -> None:
    export_model(latent_family, latent_family.scales, tmp_path / "teacher")
    file, images = tmp_path / "condense.toml", tmp_path / "images"
    config = write_config(file, images, CONDENSED, {"training.steps": 2})
    made = condense(str(tmp_path / "teacher"), config, tmp_path / "distil", tmp_path / "made")
    assert made.manifest.network.image_size == 8
    assert made.limited_data.images.dtype == torch.float16
    grey = limited_data.images[:, :1]
    flat = LabelledImages(grey.expand(-1, 3, -1, -1), limited_data.labels, limited_data.class_names)
    assert made.encoded(flat).images.shape == latent_family.encoded(limited_data).images.shape


def test_encoding_tells_that_it_goes_on(
    latent_family: Family, limited_data: LabelledImages
) -> None:
    told = Mock()
    latent_family.encoded(limited_data, told)
    assert told.call_count == 7  # 200 images, 32 at once
