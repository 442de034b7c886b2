"""Images by their digests, as a `docker` tells them."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

FILE = Path(__file__).parents[2] / "deploy" / "pin_images.py"
COMPOSE = FILE.parents[1] / "docker-compose.yml"
DOCKER = """#!/bin/sh
[ "$2 $3" = "imagetools inspect" ] || exit 2
case "$6" in $REFUSED) echo "no such image" >&2; exit 1;; esac
echo "sha256:$(echo "$6" | sha256sum | cut -c1-64)"
"""


@pytest.fixture
def docker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "docker").write_text(DOCKER)
    (tmp_path / "docker").chmod(0o700)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")


def pin(root: Path) -> "subprocess.CompletedProcess[str]":
    (root / "deploy").mkdir()
    (root / "docker").mkdir(exist_ok=True)
    (root / "deploy" / "pin_images.py").write_text(FILE.read_text())
    (root / "docker-compose.yml").write_text(COMPOSE.read_text())
    command = [sys.executable, str(root / "deploy" / "pin_images.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_every_image_that_is_not_ours_is_taken_by_its_digest(docker: None, tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    assert pin(root).returncode == 0
    made = yaml.safe_load((root / "docker" / "digests.yml").read_text())["services"]
    services = yaml.safe_load(COMPOSE.read_text())["services"]
    theirs = {name: of["image"] for name, of in services.items() if "${" not in of["image"]}
    assert made.keys() == theirs.keys()
    for name, image in theirs.items():
        tag, _, digest = made[name]["image"].partition("@")
        assert tag == image
        assert len(digest) == len("sha256:") + 64


def test_an_image_that_cannot_be_asked_for_is_said(
    docker: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFUSED", "redis:*")
    root = tmp_path / "root"
    root.mkdir()
    told = pin(root)
    assert (told.returncode, (root / "docker" / "digests.yml").exists()) == (1, False)
    assert "redis:7.4.2-bookworm cannot be asked for: no such image" in told.stderr
