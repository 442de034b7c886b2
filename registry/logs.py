"""Structured logs: one JSON object per line, whichever library wrote it."""

import logging
import sys

import structlog
from structlog import processors, stdlib
from structlog.typing import Processor


def configure_logging(log_format: str) -> None:
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        stdlib.add_log_level,
        stdlib.add_logger_name,
        processors.TimeStamper(fmt="iso", utc=True),
        processors.StackInfoRenderer(),
    ]
    rendering: list[Processor] = [processors.format_exc_info, processors.JSONRenderer()]
    if log_format == "console":
        rendering = [structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty())]
    last = [stdlib.ProcessorFormatter.remove_processors_meta, *rendering]
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=last))
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.INFO)
    structlog.configure(
        processors=[*shared, stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=stdlib.LoggerFactory(),
        wrapper_class=stdlib.BoundLogger,
    )
