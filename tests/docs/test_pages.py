"""README.md and docs/: they name what exists, and show what was made of it."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.docs import MARK, TABLES, blocks, render

ROOT = Path(__file__).parent.parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)#\s]*)(?:#([^)\s]+))?\)")

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def anchors(page: Path) -> set[str]:
    """Anchors that GitHub and mkdocs make of the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading).lower().replace(" ", "-") for heading in headings}


def test_the_readme_opens_with_the_two_commands() -> None:
    first_block = README.read_text().split("```")[1].splitlines()
    assert [line.split("#")[0].strip() for line in first_block[1:3]] == ["make up", "make test"]


def test_the_readme_can_be_read_in_three_minutes() -> None:
    assert README.stat().st_size <= 9_000


@every_page
def test_every_link_has_a_target(page: Path) -> None:
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), f"{page.name}: {path}"
        assert not anchor or anchor in anchors(target), f"{page.name}: {path}#{anchor}"


@every_page
def test_every_folder_and_file_that_it_names_exists(page: Path) -> None:
    named = re.findall(r"`(\w+)(/[\w./-]*)`", page.read_text())
    rooms = {path.name for path in ROOT.iterdir()} - {"var"}
    assert [a + b for a, b in named if a in rooms and not (ROOT / (a + b)).exists()] == []


@every_page
def test_every_make_target_that_it_names_exists(page: Path) -> None:
    for target in set(re.findall(r"`make ([a-z-]+)", page.read_text())):
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_figures_are_those_of_the_last_benchmarks() -> None:
    """Whether they are of the present code, too, `make figures-check` tells."""
    made, mark = blocks(), re.escape(MARK).replace(r"\{\}", "[^.]+")
    for page in PAGES:
        shown = re.sub(mark, "", page.read_text())
        assert render(shown, made) == shown, page.name


def test_every_table_is_shown_once() -> None:
    text = "".join(page.read_text() for page in PAGES)
    assert {name: text.count(f"<!-- {name} -->") for name in TABLES} == dict.fromkeys(TABLES, 1)


def test_the_page_of_settings_is_that_of_the_class() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "list_settings.py"))["page"]
    assert page() == (ROOT / "docs" / "settings.md").read_text()


def test_the_page_of_families_is_that_of_their_files() -> None:
    page = runpy.run_path(str(ROOT / "docs" / "list_families.py"))["page"]
    assert page() == (ROOT / "docs" / "families.md").read_text()


def test_the_page_of_bounds_is_that_of_the_code_and_names_tests_that_there_are() -> None:
    listed = runpy.run_path(str(ROOT / "docs" / "list_bounds.py"))
    assert listed["page"]() == (ROOT / "docs" / "bounds.md").read_text()
    for bound in listed["BOUNDS"]:
        file, _, test = bound.test.partition("::")
        assert f"def {test}(" in (ROOT / file).read_text(), bound.test


def test_the_site_is_made_without_a_warning(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "serving.png" in (tmp_path / "results.html").read_text()
    assert (tmp_path / "benchmarks" / "results" / "serving.png").exists()
