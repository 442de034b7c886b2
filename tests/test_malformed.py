"""Files of a family or a model are loaded or refused, whatever they hold."""

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

from learngenes.family.family import Family, FamilyError, file_sha256, load_family
from learngenes.model.factors import Scales, own_from_stacked
from registry.errors import ArtifactError
from registry.store import DirectoryStore
from tests.support.failures import EDIT, Edit, damaged
from worker.artifacts import OWN_FILE, load_own

Edits = list[Edit]
EDITS = st.lists(EDIT, min_size=1, max_size=4)
CUTS = st.none() | st.floats(0, 1)
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
def manifest_of(family: Path) -> Iterator[dict[str, Any]]:
    """Manifest of a family, which is written again with what is changed in it."""
    manifest = json.loads((family / "family.json").read_text())
    yield manifest
    (family / "family.json").write_text(json.dumps(manifest))


@contextmanager
def copied(family: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as directory:
        copy = Path(directory) / "family"
        shutil.copytree(family, copy)
        yield copy
        assert [path.name for path in Path(directory).iterdir()] == ["family"]


def fields(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path of every value of a JSON document."""
    yield path
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from fields(inner, (*path, key))


@often
@given(name=st.sampled_from(FILES), edits=EDITS, cut=CUTS)
def test_any_bytes_in_a_familys_files(
    families_dir: Path, name: str, edits: Edits, cut: float | None
) -> None:
    with copied(families_dir / "tiny") as family:
        path = family / f"{name}.safetensors"
        path.write_bytes(damaged(path.read_bytes(), edits, cut, head=800))
        with manifest_of(family) as manifest:
            manifest["sha256"][path.name] = file_sha256(path)
        with suppress(FamilyError):
            assert load_family(family).manifest.name == "tiny"


@often
@given(data=st.data())
def test_any_value_in_a_familys_manifest(families_dir: Path, data: st.DataObject) -> None:
    with copied(families_dir / "tiny") as family:
        manifest = json.loads((family / "family.json").read_text())
        *parents, last = ("", *data.draw(st.sampled_from([*fields(manifest)])))
        at = document = {"": manifest}
        for key in parents:
            at = at[key]
        at[last] = data.draw(VALUES)
        (family / "family.json").write_text(json.dumps(document[""]))
        with suppress(FamilyError):
            load_family(family)


@pytest.mark.parametrize("name", ["../stem.safetensors", "/etc/hostname", "a/../../b"])
def test_a_family_names_files_of_its_own_alone(families_dir: Path, name: str) -> None:
    with copied(families_dir / "tiny") as family:
        with manifest_of(family) as manifest:
            manifest["sha256"][name] = "0" * 64
        with pytest.raises(FamilyError, match="names a file outside"):
            load_family(family)


@often
@given(edits=EDITS, cut=CUTS)
def test_any_bytes_in_a_models_file(
    family: Family, scales: Scales, edits: Edits, cut: float | None
) -> None:
    content = damaged(save(scales.stacked()), edits, cut, head=800)
    with tempfile.TemporaryDirectory() as directory:
        store = DirectoryStore(Path(directory))
        about = {"family_fingerprint": family.fingerprint}
        store.put("models/m-1/revision-0", {OWN_FILE: content}, about)
        try:
            own = load_own(store, family, "models/m-1/revision-0")
        except ArtifactError:
            pass
        else:
            assert own_from_stacked(own.stacked()).stacked().keys() == own.stacked().keys()
