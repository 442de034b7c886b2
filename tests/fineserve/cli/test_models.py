"""`fineserve models …` and `fineserve generate` against a real server."""

import io
import json
import socket
from pathlib import Path

import pytest
from click.testing import Result
from PIL import Image
from typer.testing import CliRunner

from fineserve.cli.main import cli
from fineserve.wire import ExportFormat
from learngenes.formats.native import load_model
from registry.records import ModelStatus
from tests.service.conftest import beat
from worker.export.export import export
from worker.runtime import Runtime


@pytest.fixture(autouse=True)
def alive(runtime: Runtime) -> None:
    beat(runtime)


def run(url: str, *words: str) -> Result:
    return CliRunner().invoke(cli, [*words, "--url", url])


def made(url: str, *options: str) -> str:
    result = run(url, "models", "create", "--max-mem-gb", "4", "--json", *options)
    assert result.exit_code == 0, result.output
    return str(json.loads(result.stdout)["id"])


def test_from_a_budget_to_images_in_a_folder(url: str, working: None, tmp_path: Path) -> None:
    model = made(url, "--name", "small one")
    told = run(url, "models", "show", model)
    assert "small one" in told.stdout
    assert "ready" in told.stdout
    assert "(measured)" in told.stdout
    out = tmp_path / "images"
    sampled = run(
        url, "generate", model, "--class", "star", "--class", "0", "--steps", "2", "--seed", "5",
        "--out", str(out),
    )  # fmt: skip
    assert sampled.exit_code == 0, sampled.output
    files = sampled.stdout.split()
    assert sorted(Path(file).name.split("-", 2)[2] for file in files) == [
        "class0-seed6.png",
        "class3-seed5.png",
    ]
    assert [Image.open(io.BytesIO(Path(f).read_bytes())).size for f in files] == [(8, 8)] * 2


def test_a_model_is_refined(url: str) -> None:
    model = made(url, "--refine-seconds", "30", "--no-wait")
    answer = json.loads(run(url, "models", "show", model, "--json").stdout)
    assert answer["refine"] == {"max_seconds": 30, "stopped": False}


def test_answers_for_scripts(url: str, working: None, tmp_path: Path) -> None:
    models = [made(url), made(url)]
    listed = json.loads(run(url, "models", "list", "--json").stdout)
    assert [model["id"] for model in listed] == models[::-1]
    assert models[0] in run(url, "models", "list").stdout
    sampled = run(url, "generate", models[0], "--steps", "1", "--out", str(tmp_path), "--json")
    answer = json.loads(sampled.stdout)
    assert answer["status"] == "done"
    assert len(answer["files"]) == 5
    assert json.loads(run(url, "models", "watch", models[1], "--json").stdout)["status"] == "ready"
    deleted = run(url, "models", "delete", *models, "--json")
    assert [json.loads(line) for line in deleted.stdout.splitlines()] == [
        {"deleted": model} for model in models
    ]
    assert json.loads(run(url, "models", "list", "--json").stdout) == []


def test_what_is_refused_is_said_and_is_no_success(url: str) -> None:
    infeasible = run(url, "models", "create", "--max-mem-gb", "1e-6")
    assert infeasible.exit_code == 1
    assert "no size fits" in infeasible.stderr
    unknown = run(url, "models", "watch", "m-0123456789abcdef")
    assert unknown.exit_code == 1
    assert "no model" in unknown.stderr
    queued = run(url, "models", "create", "--max-mem-gb", "4", "--no-wait", "--json")
    early = run(url, "generate", json.loads(queued.stdout)["id"])
    assert early.exit_code == 1
    assert "is queued" in early.stderr


def test_a_build_that_fails_is_no_success(
    url: str, working: None, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(runtime.families, "tiny")
    result = run(url, "models", "create", "--max-mem-gb", "4")
    assert result.exit_code == 1
    assert "is failed: LookupError: this worker has no family" in result.stderr


def test_a_generation_that_is_cancelled_is_no_success(
    url: str, working: None, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = made(url)

    def gone(_: object, record_id: str) -> None:
        runtime.repository.generations.change(record_id, status="cancelled")

    monkeypatch.setattr("worker.sampling.sample.Sampling.generate", gone)
    result = run(url, "generate", model, "--out", str(tmp_path))
    assert result.exit_code == 1
    assert "is cancelled" in result.stderr
    assert list(tmp_path.glob("*.png")) == []


def test_where_nobody_answers_the_exit_code_says_so() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{free.getsockname()[1]}"
        for words in (["models", "list"], ["models", "watch", "m-1"], ["generate", "m-1"]):
            result = run(nowhere, *words)
            assert result.exit_code == 3
            assert "`fineserve up`, or say --url" in result.stderr


def test_a_deleted_model_says_so_in_its_state(url: str, working: None, runtime: Runtime) -> None:
    model = made(url)
    run(url, "models", "delete", model)
    assert runtime.repository.models.get(model).status == ModelStatus.DELETED


def test_a_model_is_exported_into_a_directory(
    url: str, working: None, runtime: Runtime, tmp_path: Path
) -> None:
    model = made(url)
    export(runtime, model, ExportFormat.DIFFUSERS)
    out = tmp_path / "exports"
    told = run(url, "models", "export", model, "--out", str(out), "--json")
    assert json.loads(told.stdout) == {"directory": str(out / model)}
    names = {str(p.relative_to(out / model)) for p in (out / model).rglob("*") if p.is_file()}
    assert names == {
        "README.md",
        "id2label.json",
        "scheduler/scheduler_config.json",
        "transformer/config.json",
        "transformer/diffusion_pytorch_model.safetensors",
    }
    export(runtime, model, ExportFormat.NATIVE)
    run(url, "models", "export", model, "--out", str(tmp_path), "--format", "native")
    assert (
        load_model(tmp_path / model).manifest.depth
        == runtime.repository.models.get(model).plan.depth
    )
    again = run(url, "models", "export", model, "--out", str(out))
    assert (again.exit_code, "exists" in again.stderr) == (1, True)
    unknown = run(url, "models", "export", "m-0123456789abcdef", "--out", str(out))
    assert (unknown.exit_code, "no model" in unknown.stderr) == (1, True)
