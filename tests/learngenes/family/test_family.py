import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from learngenes.family.family import FamilyError, file_sha256, load_family, write_quality
from learngenes.model.factors import Learngenes, Scales
from tests.support.sizing import quality_table

SHIPPED = sorted(Path("families").glob("*/family.json"))


@pytest.fixture
def directory(families_dir: Path) -> Path:
    return families_dir / "tiny"


def rewrite(directory: Path, **changes: object) -> None:
    path = directory / "family.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_family_comes_back_as_it_was_saved(
    directory: Path, genes: Learngenes, scales: Scales
) -> None:
    family = load_family(directory)
    assert torch.equal(family.genes.u["qkv"], genes.u["qkv"])
    assert torch.equal(family.scales.stacked()["sigma.o"], scales.stacked()["sigma.o"])
    assert len(family.limited_data) == 200
    assert not any(p.requires_grad for p in family.genes.parameters())


def test_a_corrupt_file_is_named(directory: Path) -> None:
    path = directory / "learngenes.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(FamilyError, match=r"learngenes\.safetensors is corrupt.*restore it"):
        load_family(directory)


def test_a_missing_file_is_named(directory: Path) -> None:
    (directory / "stem.safetensors").unlink()
    with pytest.raises(FamilyError, match=r"stem\.safetensors is missing"):
        load_family(directory)


def test_an_unhashed_file_is_refused(directory: Path) -> None:
    rewrite(directory, sha256={})
    with pytest.raises(FamilyError, match=r"lists no hash for learngenes\.safetensors"):
        load_family(directory)


def test_a_file_that_is_not_safetensors_is_refused(directory: Path) -> None:
    path = directory / "scales.safetensors"
    path.write_bytes(b"not tensors")
    hashes = json.loads((directory / "family.json").read_text())["sha256"]
    rewrite(directory, sha256={**hashes, path.name: file_sha256(path)})
    with pytest.raises(FamilyError, match="is not a safetensors file"):
        load_family(directory)


def test_tensors_of_another_shape_are_refused(directory: Path) -> None:
    network = json.loads((directory / "family.json").read_text())["network"]
    rewrite(directory, network={**network, "width": 64})
    with pytest.raises(FamilyError, match="do not fit"):
        load_family(directory)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "schema_version None"),
        ('{"schema_version": 99}', "schema_version 99, this release reads 1"),
        ('{"schema_version": 1}', "is not valid"),
    ],
)
def test_a_bad_manifest_says_what_is_wrong(directory: Path, content: str, message: str) -> None:
    (directory / "family.json").write_text(content)
    with pytest.raises(FamilyError, match=message):
        load_family(directory)


def test_no_manifest_no_family(tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match="is not a family"):
        load_family(tmp_path)


def test_a_family_that_was_not_calibrated_has_no_quality_table(directory: Path) -> None:
    hashes = json.loads((directory / "family.json").read_text())["sha256"]
    rewrite(directory, sha256={k: v for k, v in hashes.items() if k != "quality.json"})
    assert load_family(directory).quality is None


def test_a_quality_table_is_kept_with_its_hash(directory: Path) -> None:
    before = load_family(directory)
    table = quality_table(before.manifest.sizes)
    write_quality(directory, table)
    family = load_family(directory)
    assert family.quality == table
    assert family.fingerprint == before.fingerprint
    (directory / "quality.json").write_text("{}")
    with pytest.raises(FamilyError, match=r"quality\.json is corrupt"):
        load_family(directory)


def test_an_invalid_quality_table_says_how_to_measure_another(directory: Path) -> None:
    path = directory / "quality.json"
    path.write_text("{}")
    hashes = json.loads((directory / "family.json").read_text())["sha256"]
    rewrite(directory, sha256={**hashes, path.name: file_sha256(path)})
    with pytest.raises(FamilyError, match="run `fineserve calibrate"):
        load_family(directory)


def test_other_weights_have_another_fingerprint(directory: Path) -> None:
    before = load_family(directory).fingerprint
    hashes = json.loads((directory / "family.json").read_text())["sha256"]
    path = directory / "stem.safetensors"
    save_file({name: tensor + 1 for name, tensor in load_file(path).items()}, path)
    rewrite(directory, sha256={**hashes, path.name: file_sha256(path)})
    assert load_family(directory).fingerprint != before


@pytest.mark.parametrize("manifest", SHIPPED, ids=str)
def test_shipped_families_are_whole(manifest: Path) -> None:
    family = load_family(manifest.parent)
    assert family.manifest.name == manifest.parent.name
    counts = family.limited_data.labels.bincount()
    assert len(counts) == family.manifest.network.num_classes
    assert counts.min() >= 50
    assert family.quality is not None
    assert {"config.toml", "log.jsonl", "samples.png"} <= family.manifest.sha256.keys()
