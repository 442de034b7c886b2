"""Every query of every dashboard and alert, asked of a Prometheus that scrapes a live service."""

import contextlib
import json
import re
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.deployment import Deployment, wait

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
    """What each alert looks at, without its threshold."""
    rules = re.findall(
        r"alert: (\w+)\n\s+expr: (?:>\n)?(.*?)\n\s+(?:for|labels):", ALERTS.read_text(), re.DOTALL
    )
    return {
        f"alert {name}": re.sub(r"\s*(==|>|<)\s*[\d.e]+\s*$", "", " ".join(query.split()))
        for name, query in rules
    }


class Prometheus:
    def __init__(self, target: str) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="prometheus-")
        path = Path(self._directory.name)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ALERTS)],
            "scrape_configs": [
                {"job_name": "fineserve", "static_configs": [{"targets": [target]}]},
            ],
        }
        (path / "prometheus.yml").write_text(json.dumps(config))  # JSON is YAML
        self._process = subprocess.Popen(
            [
                BIN / "prometheus",
                f"--config.file={path / 'prometheus.yml'}",
                f"--storage.tsdb.path={path / 'data'}",
                f"--web.listen-address=127.0.0.1:{port}",
                "--log.level=error",
            ]
        )
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1", timeout=10)

    def ready(self) -> bool:
        try:
            targets = self._http.get("/targets").json()["data"]["activeTargets"]
        except (httpx.HTTPError, ValueError):
            return False
        return [target["health"] for target in targets] == ["up"]

    def ask(self, query: str) -> list[float]:
        answer = self._http.get("/query", params={"query": query}).json()
        assert answer["status"] == "success", f"{query}: {answer}"
        return [float(result["value"][1]) for result in answer["data"]["result"]]

    def rules(self) -> dict[str, str]:
        """Health of each by name."""
        groups = self._http.get("/rules").json()["data"]["groups"]
        return {rule["name"]: rule["health"] for group in groups for rule in group["rules"]}

    def stop(self) -> None:
        self._process.terminate()
        self._process.wait()
        self._http.close()
        self._directory.cleanup()


@pytest.fixture
def prometheus(deployment: Deployment) -> Iterator[Prometheus]:
    up = deployment.run("up")
    assert up.returncode == 0, up.stdout + up.stderr
    prometheus = Prometheus(deployment.http.base_url.netloc.decode())
    try:
        wait(lambda: prometheus.ready() or None)
        yield prometheus
    finally:
        prometheus.stop()


def load(deployment: Deployment) -> None:
    """Of everything that an operator can watch, a little; and again, so that there are rates."""
    http = deployment.http
    http.post("/plan", json={"max_mem_gb": 1e-9})
    http.get("/models/m-0123456789abcdef")
    models = [deployment.client.create_model(max_mem_gb=gb).id for gb in (4, 1)]
    for _ in range(3):
        for model in models:
            deployment.wait_model(model, lambda m: m.revision is not None)
            answer = http.post("/generate", json={"model": model, "n": 2, "num_inference_steps": 5})
            assert answer.status_code == 200, answer.text
        for model in models:
            deployment.client.wait(model)
        time.sleep(2)


def test_every_query_has_data(
    deployment: Deployment,
    prometheus: Prometheus,
    record_property: Callable[[str, object], None],
) -> None:
    queries = panel_queries() | alert_queries()
    assert len(queries) > 30
    load(deployment)
    missing = dict(queries)

    def all_answered() -> bool | None:
        for name, query in list(missing.items()):
            values = prometheus.ask(query.replace("$__rate_interval", "2m"))
            if any(value == value for value in values):  # not all NaN
                del missing[name]
        return not missing or None

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
    names = {name.removeprefix("alert ") for name in alert_queries()}
    assert set(prometheus.rules()) == names
    listed = set((ROOT / "docs" / "metrics.md").read_text().splitlines())
    assert set(rows(deployment.http.get("/metrics").text)) <= listed


def test_prometheus_accepts_the_alerts_and_they_fire_when_they_should() -> None:
    for command in (
        ["check", "rules", ALERTS],
        ["test", "rules", ALERTS.with_name("alerts_test.yml")],
    ):
        done = subprocess.run(
            [BIN / "promtool", *command], capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


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
    assert len(before) == 3
