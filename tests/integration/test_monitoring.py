"""Every query of every dashboard and alert, asked of a Prometheus that scrapes a live service."""

import contextlib
import json
import re
import runpy
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from benchmarks.deployment import Deployment, free_port, wait

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent
BIN = ROOT / ".venv" / "prometheus" / "usr" / "bin"
ALERTS = ROOT / "docker" / "prometheus" / "alerts.yml"
DASHBOARDS = sorted((ROOT / "docker" / "grafana" / "dashboards").glob("*.json"))
rows = runpy.run_path(str(ROOT / "docs" / "list_metrics.py"))["rows"]


def panel_queries() -> dict[str, str]:
    """PromQL by dashboard, panel and legend."""
    return {
        f"{path.stem}: {panel['title']}: {target['legendFormat']}": target["expr"]
        for path in DASHBOARDS
        for panel in json.loads(path.read_text())["panels"]
        for target in panel["targets"]
    }


def alert_queries() -> dict[str, str]:
    """PromQL of each alert, without its thresholds."""
    rules = re.findall(
        r"alert: (\w+)\n\s+expr: (?:>\n)?(.*?)\n\s+(?:for|labels):", ALERTS.read_text(), re.DOTALL
    )
    return {
        f"alert {name}": re.sub(r"\s*(==|>|<)\s*[\d.e]+", "", " ".join(query.split()))
        for name, query in rules
    }


class Prometheus:
    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/api/v1"

    def _told(self, path: str, **params: str) -> dict[str, Any]:
        answer = httpx.get(f"{self._url}/{path}", params=params, trust_env=False, timeout=10).json()
        assert answer["status"] == "success", f"{params}: {answer}"
        return answer["data"]

    def ready(self) -> bool:
        try:
            targets = self._told("targets")["activeTargets"]
        except (httpx.HTTPError, ValueError):
            return False
        return [target["health"] for target in targets] == ["up"]

    def ask(self, query: str) -> list[float]:
        return [float(result["value"][1]) for result in self._told("query", query=query)["result"]]

    def rules(self) -> dict[str, str]:
        """Health of each rule by its name."""
        groups = self._told("rules")["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}


@pytest.fixture
def prometheus(deployment: Deployment, tmp_path: Path) -> Iterator[Prometheus]:
    deployment.environment["FINESERVE_RETRAINING_STEPS"] = "40"
    deployment.up()
    port = free_port()
    scraped = {"targets": [deployment.http.base_url.netloc.decode()]}
    config = {
        "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "fineserve", "static_configs": [scraped]}],
    }
    (tmp_path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
    command = [
        BIN / "prometheus",
        f"--config.file={tmp_path / 'prometheus.yml'}",
        f"--storage.tsdb.path={tmp_path / 'data'}",
        f"--web.listen-address=127.0.0.1:{port}",
        "--log.level=error",
    ]
    with subprocess.Popen(command) as process:
        try:
            prometheus = Prometheus(port)
            wait(prometheus.ready)
            yield prometheus
        finally:
            process.terminate()


def load(deployment: Deployment) -> None:
    """Cause a little of all that an operator can watch, repeatedly, so that there are rates."""
    http = deployment.http
    http.post("/plan", json={"max_mem_gb": 1e-9})
    http.get("/models/m-0123456789abcdef")
    models = [deployment.client.create_model(max_mem_gb=gb).id for gb in (4, 1)]
    for _ in range(3):
        promised = {"family": "tiny", "deadline_seconds": 60, "n": 1, "num_inference_steps": 5}
        http.post("/generate", json=promised).raise_for_status()
        for model in models:
            deployment.wait_model(model, lambda m: m.revision is not None)
            answer = http.post("/generate", json={"model": model, "n": 2, "num_inference_steps": 5})
            assert answer.status_code == 200, answer.text
        for model in models:
            deployment.client.wait(model)
        time.sleep(2)


def test_every_query_has_data(
    deployment: Deployment, prometheus: Prometheus, record_property: Callable[[str, object], None]
) -> None:
    queries = panel_queries() | alert_queries()
    assert len(queries) > 30
    load(deployment)
    missing = dict(queries)

    def all_answered() -> bool:
        for name, query in list(missing.items()):
            values = prometheus.ask(query.replace("$__rate_interval", "2m"))
            if any(value == value for value in values):  # not all NaN
                del missing[name]
        return not missing

    with contextlib.suppress(TimeoutError):
        wait(all_answered)
    empty_panels = {name.rpartition(": ")[0] for name in missing}
    panels = {name.rpartition(": ")[0] for name in panel_queries()}
    record_property("queries", len(queries))
    record_property("queries_with_data", len(queries) - len(missing))
    record_property("panels", len(panels))
    record_property("panels_with_data", len(panels - empty_panels))
    assert missing == {}
    assert set(prometheus.rules().values()) == {"ok"}
    assert {f"alert {name}" for name in prometheus.rules()} == set(alert_queries())
    listed = set((ROOT / "docs" / "metrics.md").read_text().splitlines())
    assert set(rows(deployment.http.get("/metrics").text)) <= listed


def test_prometheus_accepts_the_alerts_and_they_fire_when_they_should() -> None:
    for command, file in (("check", ALERTS), ("test", ALERTS.with_name("alerts_test.yml"))):
        subprocess.run([BIN / "promtool", command, "rules", file], check=True)


def test_every_alert_has_a_runbook() -> None:
    runbooks = (ROOT / "docs" / "operations.md").read_text()
    anchors = re.findall(r"runbook_url: docs/operations.md#(\w+)", ALERTS.read_text())
    assert len(anchors) == len(alert_queries())
    for anchor in anchors:
        assert re.search(rf"^### {anchor}$", runbooks, re.MULTILINE | re.IGNORECASE), anchor


def test_the_dashboards_are_those_that_the_script_makes() -> None:
    before = {path.name: path.read_text() for path in DASHBOARDS}
    subprocess.run([sys.executable, ROOT / "docker" / "grafana" / "generate.py"], check=True)
    assert {path.name: path.read_text() for path in DASHBOARDS} == before
    assert len(before) == 4
