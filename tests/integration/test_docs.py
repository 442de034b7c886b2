"""Every block of shell commands in docs/, run page by page on a live deployment."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.deployment import Deployment

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```sh" in path.read_text())
STARTED_BY_THE_FIXTURE = {"make up", "make down"}


def commands(page: str) -> str:
    blocks = re.findall(r"^```sh\n(.*?)^```$", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    lines = "".join(blocks).splitlines()
    return "\n".join(line for line in lines if line not in STARTED_BY_THE_FIXTURE)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_what_a_page_says_works(shipped: Deployment, page: str, tmp_path: Path) -> None:
    address = str(shipped.http.base_url)
    script = commands(page).replace("http://localhost:8000", address)
    script = script.replace("localhost:8000", address.removeprefix("http://"))
    script = script.replace(".venv/bin/fineserve", f"{Path(sys.executable).parent}/fineserve")
    script = script.replace("/tmp/fineserve-docs", str(tmp_path / "made"))
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env={**os.environ, **shipped.environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in re.findall(r"-o (\S+\.png)", script):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_every_link_and_picture_is_there() -> None:
    for path in DOCS.glob("*.md"):
        for target in re.findall(r"\]\((?!https?://)([^)#]+)", path.read_text()):
            assert (path.parent / target).exists(), f"{path.name}: {target}"
