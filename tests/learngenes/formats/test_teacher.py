"""DiTs of diffusers, read as networks of ours."""

import json
import shutil
from fnmatch import fnmatch
from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, DiTTransformer2DModel
from structlog.testing import capture_logs

from learngenes.config import DiffusionConfig, Mode
from learngenes.family.family import Family
from learngenes.formats.diffusers import export_model
from learngenes.formats.teacher import TeacherError, from_diffusers, read_teacher

GIVEN = (
    torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)),
    torch.tensor([3, 700]),
)


def diffusers_dit(**changes: object) -> DiTTransformer2DModel:
    torch.manual_seed(0)
    config = {
        "num_attention_heads": 4,
        "attention_head_dim": 8,
        "in_channels": 3,
        "num_layers": 3,
        "sample_size": 8,
        "patch_size": 2,
        "num_embeds_ada_norm": 5,
    }
    network = DiTTransformer2DModel(**{**config, **changes}).eval()
    for block in network.transformer_blocks:  # one embedder, as DiT is trained
        block.norm1.emb = network.transformer_blocks[0].norm1.emb
    return network


@torch.no_grad()
def test_it_predicts_what_diffusers_does() -> None:
    theirs = diffusers_dit()
    labels = torch.tensor([2, 5])
    expected = theirs(*GIVEN, labels).sample
    torch.testing.assert_close(from_diffusers(theirs)(*GIVEN, labels), expected)


@torch.no_grad()
def test_a_predicted_variance_is_left_out() -> None:
    theirs = diffusers_dit(out_channels=6)
    labels = torch.tensor([2, 5])
    expected = theirs(*GIVEN, labels).sample[:, :3]
    torch.testing.assert_close(from_diffusers(theirs)(*GIVEN, labels), expected)


@torch.no_grad()
def test_what_was_exported_comes_back(family: Family, tmp_path: Path) -> None:
    """With its noise process, and as many of the 1,000 classes as there are."""
    export_model(family, family.scales, tmp_path)
    teacher = read_teacher(str(tmp_path)).with_classes("abcde")
    assert teacher.diffusion == family.manifest.diffusion
    ours = family.assemble(family.scales, Mode.MATERIALISED)
    labels = torch.tensor([4, 5])
    torch.testing.assert_close(teacher.network(*GIVEN, labels), ours(*GIVEN, labels))
    alone = read_teacher(str(tmp_path / "transformer"))
    assert alone.diffusion == family.manifest.diffusion
    with pytest.raises(TeacherError, match="knows 1000 classes, not 1001"):
        alone.with_classes(["one"] * 1001)


def test_embedders_that_differ_are_told_of() -> None:
    theirs = diffusers_dit()
    with capture_logs() as quiet:
        from_diffusers(theirs)
    apart = DiTTransformer2DModel(**theirs.config)
    with capture_logs() as logs:
        from_diffusers(apart)
    assert (len(quiet), len(logs)) == (0, 1)
    assert "embedders differ" in logs[0]["event"]


def test_what_cannot_be_condensed_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="activation_fn is 'geglu'"):
        from_diffusers(diffusers_dit(activation_fn="geglu"))
    with pytest.raises(TeacherError, match="not a DiT that diffusers loads"):
        read_teacher(str(tmp_path))
    DiTTransformer2DModel(**diffusers_dit().config).save_pretrained(tmp_path / "transformer")
    assert read_teacher(str(tmp_path)).diffusion is None
    DDIMScheduler(prediction_type="sample").save_pretrained(tmp_path / "scheduler")
    with pytest.raises(TeacherError, match="cannot be taken over"):
        read_teacher(str(tmp_path))
    DDIMScheduler(beta_end=0.012).save_pretrained(tmp_path / "scheduler")
    with pytest.raises(TeacherError, match="betas are not those that diffusers has for linear"):
        read_teacher(str(tmp_path))
    DDIMScheduler().save_pretrained(tmp_path / "scheduler")
    diffusion = read_teacher(str(tmp_path)).diffusion
    assert diffusion == DiffusionConfig(beta_schedule="linear", prediction_type="epsilon")


COMMIT = "0" * 40


@torch.no_grad()
def test_classes_are_found_by_the_names_that_a_pipeline_tells(tmp_path: Path) -> None:
    DiTTransformer2DModel(**diffusers_dit().config).save_pretrained(tmp_path / "transformer")
    names = ["a", "b", "c", "d", "e"]
    index = {"id2label": {str(i): name for i, name in enumerate(names)}}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    teacher = read_teacher(str(tmp_path))
    chosen = teacher.with_classes(["d", "b"]).network
    whole, some = torch.tensor([3, 5]), torch.tensor([0, 2])
    torch.testing.assert_close(chosen(*GIVEN, some), teacher.network(*GIVEN, whole))
    with pytest.raises(TeacherError, match="no class 'x'"):
        teacher.with_classes(["a", "x"])


def test_a_hub_that_is_not_there_is_no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("learngenes.formats.teacher.snapshot_download", unreachable)
    with pytest.raises(TeacherError, match=r"somebody/a-dit@0+ is not a DiT .*no route"):
        read_teacher(f"somebody/a-dit@{COMMIT}")


@pytest.mark.parametrize("name", ["somebody/a-dit", "somebody/a-dit@main", "missing"])
def test_of_a_hub_one_commit_is_meant(name: str) -> None:
    with pytest.raises(TeacherError, match="@COMMIT, with its 40 digits"):
        read_teacher(name)


def test_weights_that_are_code_are_not_loaded(tmp_path: Path) -> None:
    network = DiTTransformer2DModel(**diffusers_dit().config)
    network.save_pretrained(tmp_path, safe_serialization=False)
    with pytest.raises(TeacherError, match="safetensors"):
        read_teacher(str(tmp_path))


@pytest.mark.parametrize("subfolder", ["", "transformer"])
def test_of_a_hub_what_a_teacher_needs_is_fetched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, subfolder: str
) -> None:
    hub, here = tmp_path / "hub", tmp_path / "here"
    DiTTransformer2DModel(**diffusers_dit().config).save_pretrained(hub / subfolder)

    def fetched(_: str, revision: str, allow_patterns: list[str]) -> str:
        assert revision == COMMIT
        for file in (path for path in hub.rglob("*") if path.is_file()):
            name = file.relative_to(hub)
            if any(fnmatch(str(name), pattern) for pattern in allow_patterns):
                (here / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(file, here / name)
        return str(here)

    monkeypatch.setattr("learngenes.formats.teacher.snapshot_download", fetched)
    assert (
        len(read_teacher(f"somebody/a-dit@{COMMIT}").network.layers)
        == diffusers_dit().config.num_layers
    )


def unreachable(*_: object, **__: object) -> str:
    raise OSError("no route")
