"""Whatever a family's or a model's file holds: it is loaded, or refused; nothing else."""

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save

from learngenes.family.family import FamilyError, file_sha256, load_family
from learngenes.model.factors import Scales, own_from_stacked
from registry.errors import ArtifactError
from registry.store import ArtifactStore
from worker.artifacts import OWN_FILE, load_own

FILES = ("learngenes", "stem", "scales", "limited_data")
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=6,
)
often = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@contextmanager
def copied(family: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "family"
        shutil.copytree(family, copy)
        yield copy
        assert [path.name for path in Path(directory).iterdir()] == ["family"]


def changed(content: bytes, edits: list[tuple[float, bytes]]) -> bytes:
    """Each edit overwrites what is at a share of the content, or what is in its first bytes."""
    array = bytearray(content)
    for share, replacement in edits:
        at = int(share * len(array)) if share >= 0.5 else int(share * 400)
        array[at : at + len(replacement)] = replacement
    return bytes(array)


EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.binary(min_size=1, max_size=12)), min_size=1, max_size=4
)


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where there is something, in a JSON document."""
    yield path
    items = value.items() if isinstance(value, dict) else []
    for key, inner in items:
        yield from fields(inner, (*path, key))


@often
@given(name=st.sampled_from(FILES), edits=EDITS, cut=st.none() | st.floats(0, 1))
def test_any_bytes_in_a_familys_files(
    families_dir: Path, name: str, edits: list[tuple[float, bytes]], cut: float | None
) -> None:
    with copied(families_dir / "tiny") as family:
        path = family / f"{name}.safetensors"
        content = changed(path.read_bytes(), edits)
        path.write_bytes(content if cut is None else content[: int(cut * len(content))])
        manifest = json.loads((family / "family.json").read_text())
        manifest["sha256"][path.name] = file_sha256(path)
        (family / "family.json").write_text(json.dumps(manifest))
        with suppress(FamilyError):
            assert load_family(family).manifest.name == "tiny"


@often
@given(data=st.data())
def test_any_value_in_a_familys_manifest(families_dir: Path, data: st.DataObject) -> None:
    with copied(families_dir / "tiny") as family:
        manifest = json.loads((family / "family.json").read_text())
        path = data.draw(st.sampled_from([*fields(manifest)]))
        value = data.draw(VALUES)
        if path:
            at = manifest
            for key in path[:-1]:
                at = at[key]
            at[path[-1]] = value
        else:
            manifest = value
        (family / "family.json").write_text(json.dumps(manifest))
        with suppress(FamilyError):
            load_family(family)


@pytest.mark.parametrize("name", ["../stem.safetensors", "/etc/hostname", "a/../../b"])
def test_a_family_names_files_of_its_own_alone(families_dir: Path, name: str) -> None:
    with copied(families_dir / "tiny") as family:
        manifest = json.loads((family / "family.json").read_text())
        manifest["sha256"][name] = "0" * 64
        (family / "family.json").write_text(json.dumps(manifest))
        with pytest.raises(FamilyError, match="names a file outside"):
            load_family(family)


@often
@given(edits=EDITS, cut=st.none() | st.floats(0, 1))
def test_any_bytes_in_a_models_file(
    families_dir: Path, scales: Scales, edits: list[tuple[float, bytes]], cut: float | None
) -> None:
    family = load_family(families_dir / "tiny")
    content = changed(save(scales.stacked()), edits)
    content = content if cut is None else content[: int(cut * len(content))]
    with tempfile.TemporaryDirectory() as directory:
        store = ArtifactStore(Path(directory))
        about = {"family_fingerprint": family.fingerprint}
        store.put("models/m-1/revision-0", {OWN_FILE: content}, about)
        try:
            own = load_own(store, family, "models/m-1/revision-0")
        except ArtifactError:
            pass
        else:
            assert own_from_stacked(own.stacked()).stacked().keys() == own.stacked().keys()
