"""`fineserve plan` against a real server."""

import json
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image

from benchmarks.deployment import free_port
from tests.support.commands import run
from tests.support.servers import Answer, serving


def plan(url: str, *options: str, exit_code: int = 0) -> Result:
    return run("plan", "--url", url, *options, exit_code=exit_code)


def test_the_plan_stands_among_its_neighbours(url: str) -> None:
    result = plan(url, "--max-mem-gb", "0.00035", "--family", "tiny", "--dtype", "float32")
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


def test_a_latency_can_be_the_median(url: str, tmp_path: Path) -> None:
    options = ("--max-latency-ms", "1e6", "--latency-percentile", "50", "--json")
    answer = json.loads(plan(url, *options, "--plot", str(tmp_path / "front.png")).stdout)
    left = 1e3 - answer["plan"]["predicted"]["latency_seconds"]
    assert answer["slack"]["latency_seconds"] == pytest.approx(left, abs=1e-9)


@pytest.mark.parametrize("scope", ["model", "process"])
def test_the_front_is_drawn(url: str, tmp_path: Path, scope: str) -> None:
    file = tmp_path / "front.png"
    plan(url, "--max-mem-gb", "0.5", "--mem-scope", scope, "--plot", str(file))
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
        result = plan(url, "--max-mem-gb", "4", "--plot", str(file), exit_code=1)
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
    assert message in plan(url, *options, exit_code=1).output


def test_an_absent_service_is_said() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    result = plan(url, "--max-mem-gb", "4", exit_code=3)
    assert f"no fineserve at {url}" in result.output
    assert "`fineserve up`, or say --url" in result.output


def test_another_server_is_said() -> None:
    with serving(lambda *_: Answer(404)) as url:
        result = plan(url, "--max-mem-gb", "4", exit_code=1)
    assert "answered 404: is that fineserve?" in result.output
