"""Every block of code in README.md and docs/, run page by page on a live deployment.

A page is one shell script: what a block sets, later ones see. A block that cannot be run here says
why in a comment before it, `<!-- not run: WHY -->`.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.deployment import Deployment

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
BLOCK = re.compile(
    r"(?P<not_run><!-- not run: .+? -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
SHOWN = {"json", "mermaid", "toml"}
SHORTER = {"\nsteps = 4000": "\nsteps = 20", "_steps = 50": "_steps = 2", "--steps 50": "--steps 2"}
"""What a training is replaced by, where only its way is tested."""
WHEN_IT_CAN_BE_SAMPLED = r"""
if [ -n "${model:-}" ]; then
  until curl -s http://localhost:8000/models/$model | grep -q '"revision":[0-9]'; do sleep 0.2; done
fi
"""


def script(page: Path) -> str:
    """Bash that does what a reader of the page would."""
    lines = []
    for block in BLOCK.finditer(page.read_text()):
        if block["not_run"] or block["language"] in SHOWN:
            continue
        code = block["code"]
        if block["language"] == "python":
            code = f"python - <<'PYTHON'\n{code}PYTHON\n"
        else:
            assert block["language"] == "sh", f"{page.name}: a block of {block['language']!r}"
        lines.append(code)
    return WHEN_IT_CAN_BE_SAMPLED.join(lines)


PAGES = sorted(
    filter(script, (ROOT / "README.md", *ROOT.glob("docs/*.md"))),
    key=lambda page: len(script(page)),
)
"""Pages with code, short ones first: none waits for builds that a long one leaves."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_says_works(shipped: Deployment, page: Path, tmp_path: Path) -> None:
    commands = script(page)
    for long, short in SHORTER.items():
        commands = commands.replace(long, short)
    run(commands, shipped, tmp_path)


@pytest.mark.slow
def test_a_family_is_trained_as_the_page_says(shipped: Deployment, tmp_path: Path) -> None:
    run(script(ROOT / "docs" / "data.md"), shipped, tmp_path)
    last = (tmp_path / "mine/drawn/log.jsonl").read_text().splitlines()[-1]
    assert json.loads(last)["heldout_loss"]["L4"] < 0.07, (
        "it has learned what discs and squares are"
    )


def run(commands: str, shipped: Deployment, tmp_path: Path) -> None:
    """Raises AssertionError where one fails, or where a picture that it names is none."""
    commands = commands.replace("localhost:8000", shipped.url.removeprefix("http://"))
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", commands],
        cwd=tmp_path,
        env={**os.environ, **shipped.environment, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for picture in re.findall(r"(?:-o|--plot) (\S+\.png)", commands):
        assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_readme_and_the_way_into_the_docs_are_run() -> None:
    assert {"README.md", "index.md", "budgets.md", "api.md"} <= {page.name for page in PAGES}
