import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save

from learngenes.config import DType, Mode, Size
from learngenes.family.family import (
    Family,
    FamilyError,
    file_sha256,
    load_family,
    save_family,
    write_quality,
)
from learngenes.model.factors import Learngenes, Scales
from learngenes.model.sigma import subset
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


ORDER = (2, 0, 3, 1)
"""Order in which the layers of the family of `prepared` leave."""


@pytest.fixture
def prepared(directory: Path, family: Family) -> Family:
    """The same family with a Sigma of its own for depth 2, ones."""
    of_two = subset(family.scales, (1, 3))
    for sigma in of_two.sigma.values():
        sigma.data.fill_(1)
    kept = {2: of_two, 4: family.scales}
    manifest = {
        **family.manifest.model_dump(exclude={"schema_version", "sha256"}),
        "layer_order": ORDER,
    }
    save_family(directory, manifest, family.genes, family.stem, kept, family.limited_data)
    return load_family(directory)


def test_a_prepared_size_has_a_sigma_of_its_own(prepared: Family) -> None:
    assert list(prepared.depths) == [2, 4]
    own = prepared.scales_of(Size(depth=2, rank=48))
    assert all((sigma == 1).all() for sigma in own.sigma.values())
    own.sigma["o"].data.zero_()  # memory of its own
    assert (prepared.depths[2].sigma["o"] == 1).all()
    sizes = [Size(depth=depth, rank=rank) for depth, rank in ((2, 48), (4, 48), (3, 48), (2, 24))]
    assert [prepared.is_prepared(size) for size in sizes] == [True, True, False, False]


def test_what_is_not_prepared_begins_from_the_nearest_that_is(prepared: Family) -> None:
    full = prepared.scales.stacked()
    three = prepared.scales_of(Size(depth=3, rank=24)).stacked()
    torch.testing.assert_close(three["sigma.o"], full["sigma.o"][[0, 1, 3], :24])
    torch.testing.assert_close(three["bias.o"], full["bias.o"][[0, 1, 3]])
    one = prepared.scales_of(Size(depth=1, rank=48)).stacked()
    assert (one["sigma.o"] == 1).all()
    torch.testing.assert_close(one["bias.o"], full["bias.o"][[1]])
    with pytest.raises(ValueError, match="depth 5 is more than the 4 layers"):
        prepared.scales_of(Size(depth=5, rank=48))


def test_what_was_healed_comes_back_and_is_begun_with(directory: Path, prepared: Family) -> None:
    healed = prepared.scales_of(Size(depth=2, rank=48))
    for sigma in healed.sigma.values():
        sigma.data.fill_(2)
    four = Mode.FACTORED, DType.INT4
    manifest = prepared.manifest.model_dump(exclude={"schema_version", "sha256"})
    parts = prepared.genes, prepared.stem, prepared.depths, prepared.limited_data
    save_family(directory, manifest, *parts, healed={four: {2: healed}})
    family = load_family(directory)
    small, full = Size(depth=2, rank=48), family.full_size
    assert (family.scales_of(small, *four).sigma["o"] == 2).all()
    assert (family.scales_of(Size(depth=2, rank=24), *four).sigma["o"] == 2).all()
    assert family.is_prepared(small, *four)
    others = [
        (full, *four),  # nobody has healed it
        (small, Mode.FACTORED, DType.INT3),
        (small, Mode.MATERIALISED, DType.INT4),
        (Size(depth=2, rank=24), *four),
    ]
    assert [family.is_prepared(*other) for other in others] == [False] * 4
    eight = small, Mode.FACTORED, DType.INT8  # as good as sixteen
    assert family.is_prepared(*eight)
    for size, mode, dtype in (eight, (small, Mode.FACTORED, DType.INT3)):
        assert (family.scales_of(size, mode, dtype).sigma["o"] == 1).all()


def test_scales_of_another_name_are_refused(directory: Path, prepared: Family) -> None:
    names = save({**prepared.scales.stacked(), "L4/sigma.o": torch.zeros(1)})
    replace(directory / "scales.safetensors", names)
    rewrite(directory)
    with pytest.raises(FamilyError, match="tensors do not fit"):
        load_family(directory)


def test_a_family_of_an_earlier_release_loads(directory: Path, family: Family) -> None:
    scales = family.scales.stacked()
    replace(directory / "scales.safetensors", save(scales))
    rewrite(directory, schema_version=1, form="any-size")
    earlier = load_family(directory)
    assert not earlier.is_prepared(earlier.full_size)
    torch.testing.assert_close(earlier.scales.stacked(), scales)
    between = earlier.scales_of(Size(depth=7, rank=48)).stacked()
    torch.testing.assert_close(between["sigma.o"][::2], scales["sigma.o"])
