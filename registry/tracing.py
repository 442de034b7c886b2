"""OpenTelemetry traces, from HTTP through Celery to the engine's steps; needs the extra `tracing`.

They are off, and free, unless OTEL_EXPORTER_OTLP_ENDPOINT says where to send them.
"""

import os

import structlog
from opentelemetry import trace
from opentelemetry.trace import Link

log = structlog.get_logger()

tracer = trace.get_tracer("fineserve")


def here() -> Link:
    """Link to the caller's span, for a span that belongs to several (a step of a batch, say)."""
    return Link(trace.get_current_span().get_span_context())


def start(process: str) -> bool:
    """Send the spans of this process, with Celery's messages; False when nobody wants them."""
    if not os.environ.get("OTEL_EXPORTER_OTLP_ENDPOINT"):
        return False
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.instrumentation.celery import CeleryInstrumentor
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        log.warning("no traces: pip install 'fineserve[tracing]'", reason=str(error))
        return False
    provider = TracerProvider(resource=Resource({"service.name": f"fineserve-{process}"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(provider)
    CeleryInstrumentor().instrument()
    return True
