"""The client and the command line, installed without the server's extra."""

import subprocess
import sys

import pytest

CLIENT = {
    *("fineserve", "learngenes"),
    *("httpx", "httpx_retries", "httpx_sse", "pydantic"),
    *("annotated_types", "anyio", "certifi", "h11", "httpcore", "idna", "pydantic_core", "sniffio"),
    *("typing_extensions", "typing_inspection"),
}
"""Packages of the client, with what those four need."""
COMMAND_LINE = {
    *CLIENT,
    *("registry", "pydantic_settings", "dotenv", "rich", "typer"),
    *("annotated_doc", "click", "markdown_it", "mdurl", "pygments", "shellingham"),
}
ALONE = """
import importlib.abc, runpy, sys

allowed, linux_only = set(sys.argv[1].split(",")), {"fcntl", "pwd", "grp", "resource", "termios"}

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if "registry" not in allowed and top in linux_only:
            raise ModuleNotFoundError(f"{name} is Linux's", name=name)
        if top not in allowed | sys.stdlib_module_names and not top.startswith("_sysconfigdata"):
            raise ModuleNotFoundError(f"No module named {top!r}", name=top)

sys.meta_path.insert(0, Absent())
sys.argv = sys.argv[2:]
"""
FINESERVE = "from fineserve.__main__ import main; main()"


def alone(allowed: set[str], program: str, *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", ALONE + program, ",".join(allowed), "fineserve", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_client_needs_neither_the_server_nor_linux() -> None:
    done = alone(CLIENT, "from fineserve import AsyncClient, Client; Client().close()")
    assert (done.returncode, done.stderr) == (0, "")


def test_the_command_line_needs_no_server(url: str) -> None:
    listed = alone(COMMAND_LINE, FINESERVE, "models", "list", "--json", "--url", url)
    assert (listed.returncode, listed.stdout, listed.stderr) == (0, "[]\n", "")
    helped = alone(COMMAND_LINE, FINESERVE, "--help")
    assert (helped.returncode, "pretrain" in helped.stdout) == (0, True)


@pytest.mark.parametrize(
    ("allowed", "command", "extra"),
    [
        (CLIENT, "models", "cli"),
        (COMMAND_LINE, "up", "server"),
        (COMMAND_LINE, "profile", "server"),
    ],
)
def test_an_absent_extra_is_named(allowed: set[str], command: str, extra: str) -> None:
    done = alone(allowed, FINESERVE, command)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert line.endswith(f"is not installed: pip install 'fineserve[{extra}]'")
