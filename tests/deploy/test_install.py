"""The installer's reading of pip's own configuration."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

FILE = Path(__file__).parents[2] / "deploy" / "install.py"


@pytest.fixture
def install() -> ModuleType:
    spec = importlib.util.spec_from_file_location("install", FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_uv_is_told_what_pip_is_configured_with(install: ModuleType) -> None:
    told = install.uv_environment(
        ":env:.find-links='/some/wheels /more'\n"
        ":env:.disable-pip-version-check='1'\n"
        "global.find-links='/others'\n"
        "global.cert='/a/certificate'\n"
        "global.extra-index-url='file:///one file:///two'\n"
        "freeze.timeout='10'\n"
    )
    assert told == {
        "UV_INDEX_STRATEGY": "unsafe-best-match",
        "UV_LINK_MODE": "copy",
        "UV_FIND_LINKS": "/some/wheels,/more",
        "SSL_CERT_FILE": "/a/certificate",
        "UV_INDEX": "file:///one file:///two",
    }


@pytest.mark.parametrize("option", ["proxy", "trusted-host", "client-cert"])
def test_what_uv_has_no_word_for_is_left_to_pip(install: ModuleType, option: str) -> None:
    assert install.uv_environment(f"global.{option}='something'\n") is None


PARTS = ("dev.txt", "torch.txt", FILE.parents[1].name)


class Commands:
    """In place of processes: what was run, and what fails."""

    def __init__(self, *failing: str) -> None:
        self.failing, self.run = failing, list[str]()

    def __call__(self, command: list[str], environment: dict[str, str]) -> bool:
        if "-W" in command:  # bytecode
            return True
        tool = "uv" if Path(command[0]).name == "uv" else "pip"
        self.run.append(f"{tool} {Path(command[-1]).name}")
        return self.run[-1] not in self.failing


@pytest.mark.parametrize(
    ("failing", "run", "status"),
    [
        ((), ["pip uv.txt", *("uv " + part for part in PARTS)], 0),
        (("pip uv.txt",), ["pip uv.txt", *("pip " + part for part in PARTS)], 0),
        (
            ("uv torch.txt",),
            ["pip uv.txt", "uv dev.txt", "uv torch.txt", *("pip " + part for part in PARTS)],
            0,
        ),
        (("pip uv.txt", "pip dev.txt"), ["pip uv.txt", "pip dev.txt"], 1),
    ],
)
def test_pip_installs_where_uv_cannot(
    install: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    failing: tuple[str, ...],
    run: list[str],
    status: int,
) -> None:
    commands = Commands(*failing)
    monkeypatch.setattr(install, "install", commands)
    assert install.main("dev") == status
    assert commands.run == run


def test_lines_that_nobody_can_use_are_not_shown(
    install: ModuleType, capsys: pytest.CaptureFixture[Any]
) -> None:
    noise = "WARNING: Location '/nowhere' is ignored: it is neither a file nor a directory."
    code = f"import sys; print({noise!r}, file=sys.stderr); sys.exit('no such package')"
    assert not install.install([sys.executable, "-c", code], {})
    assert capsys.readouterr().err == "no such package\n"
    assert install.install([sys.executable, "-c", "pass"], {})


def test_everything_but_torch_has_hashes() -> None:
    for file in (FILE.parent / "locks").glob("*.txt"):
        lines = file.read_text().splitlines()
        pinned = [number for number, line in enumerate(lines) if "==" in line]
        unhashed = [lines[n] for n in pinned if not lines[n + 1 :] or "--hash" not in lines[n + 1]]
        assert unhashed == (lines if file.name == "torch.txt" else []), file.name
        assert "://" not in file.read_text(), "an address of a registry"
