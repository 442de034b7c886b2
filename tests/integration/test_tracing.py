"""A trace from HTTP through Celery to the engine's steps, as a collector gets it."""

import http.server
import threading
from collections.abc import Iterator

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.deployment import Deployment, wait

pytestmark = pytest.mark.integration


class Collector(http.server.ThreadingHTTPServer):
    """Keeps the spans that it is sent by OTLP over HTTP."""

    def __init__(self) -> None:
        self.spans: list[Span] = []
        super().__init__(("127.0.0.1", 0), Handler)

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


class Handler(http.server.BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.server.spans += scope.spans
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def collector() -> Iterator[Collector]:
    server = Collector()
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_request_can_be_followed_to_its_steps(
    deployment: Deployment, collector: Collector
) -> None:
    deployment.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{collector.server_port}",
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    up = deployment.run("up")
    assert up.returncode == 0, up.stdout + up.stderr
    model = deployment.client.create_model(max_mem_gb=4).id
    deployment.wait_model(model, lambda m: m.revision is not None)
    answer = deployment.http.post("/generate", json={"model": model, "num_inference_steps": 5})
    assert answer.status_code == 200, answer.text

    def followed() -> list[Span] | None:
        """The spans of the trace that /generate began, once all are there."""
        (root,) = collector.named("POST /generate") or (None,)
        if root is None:
            return None
        of_trace = [span for span in collector.spans if span.trace_id == root.trace_id]
        ran = [span for span in of_trace if span.name == "run/fineserve.sample"]
        steps = [
            span
            for span in collector.named("engine step")
            if {link.span_id for link in span.links} & {span.span_id for span in ran}
        ]
        return of_trace + steps if len(steps) == 5 else None

    spans = wait(followed)
    names = [span.name for span in spans]
    assert "apply_async/fineserve.sample" in names
    assert deployment.run("down").returncode == 0
