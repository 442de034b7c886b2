import re
import subprocess
from pathlib import Path

from benchmarks.readme import render

README = Path("README.md").read_text()


def test_it_opens_with_the_two_commands() -> None:
    first_block = README.split("```")[1].splitlines()
    assert [line.split("#")[0].strip() for line in first_block[1:3]] == ["make up", "make test"]


def test_its_figures_are_those_of_the_last_benchmarks() -> None:
    assert render(README) == README


def test_every_file_it_shows_or_names_exists() -> None:
    named = re.findall(r"\]\(([^)#:]+)\)", README) + re.findall(r"`([a-z]+/)`", README)
    assert len(named) > 8
    assert [path for path in named if not Path(path).exists()] == []


def test_every_make_target_it_names_exists() -> None:
    targets = set(re.findall(r"make ([a-z-]+)", README))
    assert {"up", "test", "bench-main-job", "bench-sizing", "pretrain"} <= targets
    for target in targets:
        done = subprocess.run(["make", "--dry-run", target], capture_output=True, check=False)
        assert done.returncode == 0, f"make {target}"
