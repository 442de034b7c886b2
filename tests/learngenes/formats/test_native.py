"""A model that leaves, and is loaded where there is no server."""

import json
from pathlib import Path

import pytest
import torch

from learngenes.config import DType, Mode, Size
from learngenes.family.family import Family
from learngenes.formats.native import MANIFEST, ModelError, load_model, save_model
from learngenes.formats.onnx import ExportError, export_in_process
from learngenes.model.dense import materialised
from learngenes.model.factors import DenseLayers, Own

SIZE = Size(depth=3, rank=24)
OTHER_CLASSES = ("left", "right")


def own_of(family: Family, kind: str) -> Own:
    scales = family.scales_of(SIZE)
    if kind == "another task's":
        scales = family.for_task(scales, len(OTHER_CLASSES))
    if kind == "refined":
        return DenseLayers.of(materialised(family.genes, scales))
    return scales


def saved(family: Family, directory: Path, kind: str = "the family's", whole: bool = True) -> Own:
    own = own_of(family, kind)
    names = OTHER_CLASSES if own.classes is not None else family.manifest.class_names
    mode = Mode.MATERIALISED if kind == "refined" else Mode.FACTORED
    save_model(directory, family, own, mode, DType.FLOAT32, names, whole=whole)
    return own


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("kind", ["the family's", "another task's", "refined"])
def test_it_computes_what_it_did(family: Family, tmp_path: Path, kind: str, whole: bool) -> None:
    own = saved(family, tmp_path, kind, whole)
    model = load_model(tmp_path, None if whole else family)
    assert model.manifest.depth == SIZE.depth
    assert len(model.manifest.class_names) == model.network.config.num_classes
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    given = x, torch.tensor([3, 700]), torch.tensor([0, model.network.config.num_classes])
    expected = family.assemble(own, model.manifest.mode)(*given)
    torch.testing.assert_close(model.network(*given), expected)


def test_it_takes_no_more_of_its_family_than_it_needs(family: Family, tmp_path: Path) -> None:
    saved(family, tmp_path / "whole")
    saved(family, tmp_path / "own", whole=False)
    sizes = {
        form: {f.name: f.stat().st_size for f in (tmp_path / form).glob("*.safetensors")}
        for form in ("whole", "own")
    }
    family_bytes = sum(p.numel() * 4 for p in family.genes.parameters())
    assert sizes["whole"]["learngenes.safetensors"] < 0.6 * family_bytes  # rank 24 of 48
    assert [*sizes["own"]] == ["own.safetensors"]


def test_what_is_its_own_alone_needs_just_its_family(family: Family, tmp_path: Path) -> None:
    saved(family, tmp_path, whole=False)
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    with pytest.raises(ModelError, match="load the family tiny"):
        load_model(str(tmp_path))
    changed = {**manifest, "family_fingerprint": "of-another-version"}
    (tmp_path / MANIFEST).write_text(json.dumps(changed))
    with pytest.raises(ModelError, match="export the model as `native`"):
        load_model(tmp_path, family)


def test_what_is_no_model_is_refused(family: Family, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is not a model"):
        load_model(tmp_path)
    saved(family, tmp_path)
    manifest = json.loads((tmp_path / MANIFEST).read_text())

    def refusal(**changes: object) -> str:
        (tmp_path / MANIFEST).write_text(json.dumps({**manifest, **changes}))
        with pytest.raises(ModelError) as refused:
            load_model(tmp_path)
        return str(refused.value)

    assert "this release reads 1" in refusal(schema_version=2)
    assert "no model has: '../x'" in refusal(sha256={"../x": "0"})
    without = {k: v for k, v in manifest["sha256"].items() if not k.startswith("learngenes")}
    assert "tensors do not fit" in refusal(sha256=without)
    assert "is not a model" in refusal(depth=0)
    assert "is corrupt" in refusal(sha256={"own.safetensors": "0"})
    (tmp_path / "stem.safetensors").unlink()
    assert "cannot be read" in refusal()


def test_an_onnx_export_that_fails_says_why(
    family: Family, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.executable", "/bin/ls")
    with pytest.raises(ExportError, match=r"the ONNX export failed: .*learngenes\.formats\.onnx"):
        export_in_process(family, family.scales, tmp_path)
