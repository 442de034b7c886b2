"""`fineserve models …` and `fineserve generate` against a real server."""

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from benchmarks.deployment import free_port
from fineserve.wire import ExportFormat
from learngenes.formats.native import load_model
from tests.fineserve.conftest import Configure
from tests.support.commands import made, run
from worker.export.export import export
from worker.runtime import Runtime


def test_from_a_budget_to_images_in_a_folder(url: str, working: None, tmp_path: Path) -> None:
    model = made(url, "--name", "small one")
    told = run("models", "show", model, "--url", url).stdout
    assert all(part in told for part in ("small one", "ready", "(measured)"))
    choice = ("--class", "star", "--class", "0", "--steps", "2", "--seed", "5")
    sampled = run("generate", model, *choice, "--out", str(tmp_path / "images"), "--url", url)
    files = [Path(file) for file in sampled.stdout.split()]
    names = sorted(file.name.split("-", 2)[2] for file in files)
    assert names == ["class0-seed6.png", "class3-seed5.png"]
    assert [Image.open(io.BytesIO(file.read_bytes())).size for file in files] == [(8, 8)] * 2


def test_a_model_is_refined(url: str) -> None:
    model = made(url, "--refine-seconds", "30", "--no-wait")
    answer = json.loads(run("models", "show", model, "--json", "--url", url).stdout)
    assert answer["refine"] == {"max_seconds": 30, "stopped": False}


def test_the_latency_shown_is_of_the_budget_s_percentile(url: str) -> None:
    for options, percentile in (((), "p95"), (("--latency-percentile", "50"), "p50")):
        asked = ("--max-latency-ms", "1e6", *options, "--no-wait", "--json", "--url", url)
        model = json.loads(run("models", "create", *asked).stdout)
        predicted = model["plan"]["predicted"]
        seconds = predicted["latency_seconds" if options else "latency_p95_seconds"]
        told = run("models", "show", model["id"], "--url", url).stdout
        assert f"latency, {percentile}: {seconds * 1e3:.0f} ms (predicted)" in told


def test_a_model_that_waits_is_cancelled(url: str) -> None:
    model = made(url, "--no-wait")
    assert run("models", "cancel", model, "--url", url).stdout == f"{model} is cancelled\n"
    shown = run("models", "show", model, "--json", "--url", url).stdout
    assert json.loads(shown)["status"] == "cancelled"


def test_answers_for_scripts(url: str, working: None, runtime: Runtime, tmp_path: Path) -> None:
    def answers(*words: str) -> list[Any]:
        stdout = run(*words, "--json", "--url", url).stdout
        return [json.loads(line) for line in stdout.splitlines()]

    models = [made(url), made(url)]
    (listed,) = answers("models", "list")
    assert [model["id"] for model in listed] == models[::-1]
    assert models[0] in run("models", "list", "--url", url).stdout
    (sampled,) = answers("generate", models[0], "--steps", "1", "--out", str(tmp_path))
    assert (sampled["status"], len(sampled["files"])) == ("done", 5)
    guided = ("--guide", "2x8", "--guidance-stop", "0.5", "--steps", "2")
    (sampled,) = answers("generate", models[0], *guided, "--out", str(tmp_path))
    assert sampled["sampling"] == {
        "num_inference_steps": 2,
        "scheduler": "dpmsolver++",
        "guidance_scale": 2,
        "guidance_start": 0,
        "guidance_stop": 0.5,
        "guide": {"depth": 2, "rank": 8},
    }
    (watched,) = answers("models", "watch", models[1])
    assert watched["status"] == "ready"
    assert answers("models", "delete", *models) == [{"deleted": model} for model in models]
    assert {runtime.repository.models.get(model).status for model in models} == {"deleted"}
    assert answers("models", "list") == [[]]


def test_a_refusal_is_said_and_is_no_success(url: str) -> None:
    queued = made(url, "--no-wait")
    for words, message in (
        (("models", "create", "--max-mem-gb", "1e-6"), "no size fits"),
        (("models", "watch", "m-0123456789abcdef"), "no model"),
        (("generate", queued), "is queued"),
    ):
        assert message in run(*words, "--url", url, exit_code=1).stderr


def test_a_guide_that_is_no_size_is_a_wrong_command_line() -> None:
    for guide in ("2", "2x", "x8", "twox8", "2x-8"):
        told = run("plan", "--max-mem-gb", "1", "--guide", guide, exit_code=2).stderr
        assert f"--guide '{guide}' is no DEPTHxRANK" in " ".join(told.replace("│", " ").split())


def test_a_model_that_had_no_time_is_continued(
    url: str, working: None, runtime: Runtime, tmp_path: Path
) -> None:
    runtime.settings.task_least_steps = 40
    runtime.settings.retraining_max_seconds = 1e-6
    for index in range(4):
        file = tmp_path / "shapes" / f"shape{index % 2}" / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 * index).save(file)
    sent = run("tasks", "create", str(tmp_path / "shapes"), "--json", "--url", url).stdout
    task = json.loads(sent)[0]["id"]
    stopped = run(
        "models", "create", "--max-mem-gb", "4", "--task", task, "--url", url, exit_code=1
    )
    assert "undertrained" in stopped.stderr
    (listed,) = json.loads(run("models", "list", "--json", "--url", url).stdout)
    runtime.settings.retraining_max_seconds = 60
    told = run("models", "continue", listed["id"], "--json", "--url", url).stdout
    assert json.loads(told)["status"] == "ready"


def test_a_build_that_fails_is_no_success(
    url: str, working: None, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(runtime.families, "tiny")
    result = run("models", "create", "--max-mem-gb", "4", "--url", url, exit_code=1)
    assert "is failed: LookupError: this worker has no family" in result.stderr


def test_a_generation_that_is_cancelled_is_no_success(
    url: str, working: None, runtime: Runtime, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    model = made(url)

    def gone(_: object, record_id: str) -> None:
        runtime.repository.generations.change(record_id, status="cancelled")

    monkeypatch.setattr("worker.sampling.sample.Sampling.generate", gone)
    result = run("generate", model, "--out", str(tmp_path), "--url", url, exit_code=1)
    assert "is cancelled" in result.stderr
    assert list(tmp_path.glob("*.png")) == []


def test_where_nobody_answers_the_exit_code_says_so() -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    for words in (("models", "list"), ("models", "watch", "m-1"), ("generate", "m-1")):
        result = run(*words, "--url", nowhere, exit_code=3)
        assert "`fineserve up`, or say --url" in result.stderr


def test_a_model_is_exported_into_a_directory(
    url: str, working: None, runtime: Runtime, tmp_path: Path
) -> None:
    model = made(url)
    export(runtime, model, ExportFormat.DIFFUSERS)
    out = tmp_path / "exports"
    into = ("--out", str(out), "--url", url)
    told = run("models", "export", model, *into, "--json")
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
    run("models", "export", model, "--out", str(tmp_path), "--format", "native", "--url", url)
    plan = runtime.repository.models.get(model).plan
    assert load_model(tmp_path / model).manifest.depth == plan.depth
    assert "exists" in run("models", "export", model, *into, exit_code=1).stderr
    unknown = run("models", "export", "m-0123456789abcdef", *into, exit_code=1)
    assert "no model" in unknown.stderr


@pytest.mark.parametrize("key", ["abc\r", "abc\n", " abc "])
def test_the_end_of_a_line_is_no_part_of_a_key(
    url: str, monkeypatch: pytest.MonkeyPatch, configure: Configure, key: str
) -> None:
    configure(api_key=key)
    run("models", "list", "--url", url)


@pytest.mark.parametrize("key", ["caf\u00e9", "a\nb"])
def test_what_is_no_key_is_said_by_the_name_of_its_variable(
    url: str, configure: Configure, key: str
) -> None:
    configure(api_key=key)
    told = run("models", "list", "--url", url, exit_code=1).stderr
    assert "FINESERVE_API_KEY has characters that no key has" in told
    assert key not in told


@pytest.mark.parametrize("address", ["http://localhost:80a0", "http://[::1", "localhost:8000"])
def test_what_is_no_address_is_said(address: str) -> None:
    told = run("models", "list", "--url", address, exit_code=3).stderr
    assert f"--url {address} is no address" in told


def test_a_proxy_that_cannot_be_used_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:9")
    told = run("models", "list", "--url", "http://fineserve.example", exit_code=3).stderr
    assert "ALL_PROXY" in told
    assert "make up" not in told


def test_no_proxy_is_asked_for_what_is_on_this_host(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "[::1")
    run("models", "list", "--url", url)
