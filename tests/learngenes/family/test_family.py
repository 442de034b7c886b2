import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

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


def hashes(directory: Path) -> dict[str, str]:
    return dict(json.loads((directory / "family.json").read_text())["sha256"])


def replace(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    rewrite(path.parent, sha256={**hashes(path.parent), path.name: file_sha256(path)})


def test_a_family_comes_back_as_it_was_saved(
    directory: Path, genes: Learngenes, scales: Scales
) -> None:
    family = load_family(directory)
    assert torch.equal(family.genes.u["qkv"], genes.u["qkv"])
    assert torch.equal(family.scales.stacked()["sigma.o"], scales.stacked()["sigma.o"])
    assert len(family.limited_data) == 200
    assert not any(p.requires_grad for p in family.genes.parameters())


def flip_a_bit(directory: Path) -> None:
    path = directory / "learngenes.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def change_the_width(directory: Path) -> None:
    network = json.loads((directory / "family.json").read_text())["network"]
    rewrite(directory, network={**network, "width": 64})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flip_a_bit, r"learngenes\.safetensors is corrupt.*restore it"),
        (lambda d: (d / "stem.safetensors").unlink(), r"stem\.safetensors is missing"),
        (lambda d: rewrite(d, sha256={}), r"lists no hash for learngenes\.safetensors"),
        (lambda d: replace(d / "scales.safetensors", b"none"), "is not a safetensors file"),
        (lambda d: replace(d / "quality.json", b"{}"), "run `fineserve calibrate"),
        (lambda d: (d / "quality.json").write_text("{}"), r"quality\.json is corrupt"),
        (change_the_width, "do not fit"),
        (lambda d: (d / "family.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "family.json").write_text("[]"), "schema_version None"),
        (
            lambda d: (d / "family.json").write_text('{"schema_version": 99}'),
            "99, this release reads 1",
        ),
        (lambda d: (d / "family.json").write_text('{"schema_version": 1}'), "is not valid"),
        (lambda d: (d / "family.json").unlink(), "is not a family"),
    ],
)
def test_a_damaged_family_says_what_is_wrong(
    directory: Path, damage: Callable[[Path], object], message: str
) -> None:
    damage(directory)
    with pytest.raises(FamilyError, match=message):
        load_family(directory)


def test_a_family_that_was_not_calibrated_has_no_quality_table(directory: Path) -> None:
    rewrite(directory, sha256={k: v for k, v in hashes(directory).items() if k != "quality.json"})
    assert load_family(directory).quality is None


def test_a_quality_table_is_kept_with_its_hash(directory: Path) -> None:
    before = load_family(directory)
    table = quality_table(before.manifest.sizes)
    write_quality(directory, table)
    family = load_family(directory)
    assert family.quality == table
    assert family.fingerprint == before.fingerprint


def test_other_weights_have_another_fingerprint(directory: Path) -> None:
    before = load_family(directory).fingerprint
    path = directory / "stem.safetensors"
    replace(path, save({name: tensor + 1 for name, tensor in load_file(path).items()}))
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
