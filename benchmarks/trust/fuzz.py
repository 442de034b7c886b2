"""Requests that a hostile or careless client makes up, by the service's own OpenAPI document."""

import json
import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.deployment import Deployment
from benchmarks.parts import Figures
from benchmarks.trust.site import FASHION
from fineserve.client import Client
from registry.keys import Keys, Scope

EXAMPLES = 600
"""Cases of each route, in the phase that makes them up: 10,000 in all, and some."""
PHASES = ("coverage", "fuzzing", "stateful")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "unsupported_method",
    "use_after_free",
)
ENDLESS = "/status/events"
"""Left out: it has no last byte to wait for."""
TOLD_OF_ONCE_DELETED = "^/models/"
"""A model's record stays for a day, as `deleted`."""
WORK_IS_BRIEF = {
    "max_images_per_request": 8,
    "max_inference_steps": 25,
    "retraining_steps": 4,
    "profile_seconds": 2,
    "verify_seconds": 1,
    "compile": "false",
}


def measure(
    families: Path = FASHION,
    examples: int = EXAMPLES,
    phases: Sequence[str] = PHASES,
    *,
    keys: bool = False,
) -> Figures:
    """`keys`: of a service that asks for API keys, by one that may do everything."""
    with Deployment(families, **WORK_IS_BRIEF) as deployment:
        key = None
        if keys:
            _, key = Keys(deployment.var / "keys.json").create("owner", [Scope.ADMIN])
            deployment.client = Client(deployment.url, key)
        deployment.up()
        before = _ended(deployment)
        report = run(deployment, examples, phases, key)
        ended = _ended(deployment) - before
        ready = deployment.ready()
    return {
        "fuzz_cases": report["test_cases"]["generated"],
        "fuzz_failures": report["test_cases"]["with_failures"] + report["test_cases"]["errored"],
        "failures": [failure.get("title") for failure in report["failures"]][:20],
        "operations": report["operations"]["tested"],
        "left_out": [ENDLESS],
        "checks": CHECKS,
        "ended_processes": ended,
        "ready_afterwards": ready,
    }


def _ended(deployment: Deployment) -> int:
    """How many processes have ended so far."""
    return (deployment.var / "logs" / "supervisord.log").read_text().count(" exited: ")


def with_keys() -> Figures:
    figures = measure(examples=EXAMPLES // 3, keys=True)
    return {f"keys_{name}": value for name, value in figures.items()}


def run(
    deployment: Deployment, examples: int, phases: Sequence[str], key: str | None = None
) -> Figures:
    """Schemathesis' own report."""
    by = ("--header", f"Authorization: Bearer {key}") if key else ()
    model, doomed = deployment.ready_model(), deployment.ready_model(max_mem_gb=4, depth=2)
    generation = deployment.client.create_generation(model, n=1, num_inference_steps=2).id
    with tempfile.TemporaryDirectory() as directory:
        config, report = Path(directory) / "config.toml", Path(directory) / "report.json"
        config.write_text(_config(model, doomed, generation))
        subprocess.run(
            [
                *(str(deployment.bin / "schemathesis"), "--config-file", str(config), "run"),
                *(f"{deployment.url}/openapi.json", "--phases", ",".join(phases), "--seed", "1"),
                *("--max-examples", str(examples), "--exclude-path", ENDLESS, *by),
                *("--request-timeout", "600", "--no-color"),
                *("--continue-on-failure", "--generation-database", "none", "--no-shrink"),
                *("--report", "json", "--report-json-path", str(report)),
            ],
            env=os.environ | {"SCHEMATHESIS_HOOKS": "benchmarks.trust.uploads"},
            check=False,  # it tells of failures by its status, and in the report
        )
        content: Figures = json.loads(report.read_text())
    return content


def _config(model: str, doomed: str, generation: str) -> str:
    """Half of the requests name something that there is; else nearly all were 404.

    One model is there to be deleted.
    """
    checks = "\n".join(f"{check}.enabled = true" for check in CHECKS)
    return f"""
[checks]
enabled = false
{checks}
[dictionaries.models]
values = ["{model}"]
[dictionaries.doomed]
values = ["{doomed}"]
[dictionaries.generations]
values = ["{generation}"]
[parameters]
"body.model" = {{ dictionary = "models", probability = 0.5 }}
"path.model_id" = {{ dictionary = "models", probability = 0.5 }}
"path.generation_id" = {{ dictionary = "generations", probability = 0.5 }}
[[operations]]
include-path-regex = "{TOLD_OF_ONCE_DELETED}"
checks.use_after_free.enabled = false
[[operations]]
include-method = "DELETE"
[operations.parameters]
"path.model_id" = {{ dictionary = "doomed", probability = 0.5 }}
"""
