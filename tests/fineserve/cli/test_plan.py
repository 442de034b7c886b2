"""`fineserve plan` against a real server."""

import http.server
import json
import socket
import threading
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fineserve.cli.main import cli


def plan(url: str, *options: str) -> Result:
    return CliRunner().invoke(cli, ["plan", "--url", url, *options])


def test_the_plan_stands_among_its_neighbours(url: str) -> None:
    result = plan(url, "--max-mem-gb", "0.00035", "--family", "tiny", "--dtype", "float32")
    assert result.exit_code == 0, result.output
    rows = [line for line in result.output.splitlines() if "float32" in line]
    assert len(rows) > 2
    (chosen,) = (row for row in rows if "→" in row)
    worth = [float(row.replace("│", " ").replace("→", " ").split()[4]) for row in rows]
    assert worth == sorted(worth, reverse=True)
    assert worth[0] > worth[rows.index(chosen)]
    assert "bound by max_mem_gb; left of the budget: 0.0 MB" in result.output


def test_a_large_budget_is_not_what_binds(url: str) -> None:
    result = plan(url, "--max-mem-gb", "4", "--max-latency-ms", "1e6")
    assert "nothing binds: the family's best; left of the budget: " in result.output


@pytest.mark.parametrize("scope", ["model", "process"])
def test_the_front_is_drawn(url: str, tmp_path: Path, scope: str) -> None:
    file = tmp_path / "front.png"
    result = plan(url, "--max-mem-gb", "0.5", "--mem-scope", scope, "--plot", str(file))
    assert result.exit_code == 0, result.output
    picture = Image.open(file)
    assert picture.size == (960, 540)
    assert len(picture.convert("RGB").getcolors(10**6)) > 50


def test_a_plan_for_scripts(url: str, tmp_path: Path) -> None:
    file = tmp_path / "front.png"
    result = plan(url, "--max-mem-gb", "0.5", "--json", "--plot", str(file))
    answer = json.loads(result.stdout)
    assert answer["plan"] in answer["front"]
    assert file.exists()


def test_what_cannot_be_drawn_is_said(url: str, tmp_path: Path) -> None:
    for file in (tmp_path / "front.xyz", tmp_path / "nowhere" / "front.png"):
        result = plan(url, "--max-mem-gb", "4", "--plot", str(file))
        assert result.exit_code == 1
        assert f"{file} cannot be written" in result.output


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max-mem-gb", "1e-6"], "no size fits; the nearest (depth 2, rank 8"),
        (["--max-mem-gb", "nan"], "max_mem_gb: Input should be a finite number"),
        (["--max-mem-gb", "4", "--family", "huge"], "no family 'huge'; choose one of tiny"),
        ([], "send a budget"),
    ],
)
def test_the_services_refusal_is_shown(url: str, options: list[str], message: str) -> None:
    result = plan(url, *options)
    assert result.exit_code == 1
    assert message in result.output


def test_an_absent_service_is_said() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        result = plan(url, "--max-mem-gb", "4")
    assert result.exit_code == 3
    assert f"no fineserve at {url}" in result.output
    assert "`fineserve up`, or say --url" in result.output


def test_another_server_is_said() -> None:
    class Silent(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_error(404)

        do_GET = do_POST  # noqa: N815 - the name is http.server's

        def log_message(self, *_: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Silent) as server:
        threading.Thread(target=server.serve_forever).start()
        result = plan(f"http://127.0.0.1:{server.server_port}", "--max-mem-gb", "4")
        server.shutdown()
    assert result.exit_code == 1
    assert "answered 404: is that fineserve?" in result.output
