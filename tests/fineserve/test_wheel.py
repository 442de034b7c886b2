"""The wheel, installed where there is no checkout."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from registry.settings import Settings, found_families

ROOT = Path(__file__).parent.parent.parent
FAMILIES = {path.parent.name for path in ROOT.glob("families/*/family.json")}


def test_the_wheel_has_the_families_and_the_page(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {f"fineserve/families/{family}/family.json" for family in FAMILIES} <= names
    assert {"service/web/index.html", "service/web/vendor/preact.js", "fineserve/py.typed"} <= names
    assert not [name for name in names if "families/prepare" in name or name.startswith("tests")]


def test_families_of_this_folder_go_before_those_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "packages" / "fineserve" / "families").mkdir(parents=True)
    assert found_families(tmp_path / "packages") == tmp_path / "packages/fineserve/families"
    (tmp_path / "families").mkdir()
    assert found_families(tmp_path / "packages") == Path("families")
    assert Settings().families_dir == Path("families")
