"""A trace from HTTP through Celery to the engine's steps, as a collector gets it."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from benchmarks.deployment import Deployment, wait
from tests.support.servers import Answer, serving

pytestmark = pytest.mark.integration


@dataclass
class Collector:
    """Keeps the spans that it is sent by OTLP over HTTP."""

    spans: list[Span] = field(default_factory=list)
    url: str = ""

    def __call__(self, method: str, path: str, body: bytes) -> Answer:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            for scope in resource.scope_spans:
                self.spans += scope.spans
        return Answer()

    def named(self, name: str) -> list[Span]:
        return [span for span in self.spans if span.name == name]


@pytest.fixture
def collector() -> Iterator[Collector]:
    collector = Collector()
    with serving(collector) as collector.url:
        yield collector


def test_a_request_is_followed_to_its_steps(deployment: Deployment, collector: Collector) -> None:
    deployment.environment |= {
        "OTEL_EXPORTER_OTLP_ENDPOINT": collector.url,
        "OTEL_BSP_SCHEDULE_DELAY": "200",
    }
    deployment.up()
    model = deployment.client.create_model(max_mem_gb=4).id
    deployment.wait_model(model, lambda m: m.revision is not None)
    answer = deployment.http.post("/generate", json={"model": model, "num_inference_steps": 5})
    assert answer.status_code == 200, answer.text

    def followed() -> list[Span] | None:
        """Spans of the trace that /generate began, once all are there."""
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
