import json
import logging
from collections.abc import Iterator

import pytest
import structlog

from registry.logs import configure_logging


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers, root.level
    yield
    root.handlers, root.level = handlers, level
    structlog.reset_defaults()


def test_every_library_logs_json(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("json")
    structlog.get_logger("ours").info("hello", answer=42)
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("theirs").exception("failed %s", "badly")
    ours, theirs = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (ours["event"], ours["answer"], ours["level"]) == ("hello", 42, "info")
    assert (theirs["event"], theirs["logger"]) == ("failed badly", "theirs")
    assert "ValueError: broken" in theirs["exception"]


def test_people_get_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging("console")
    structlog.get_logger("ours").info("hello")
    assert "hello" in capsys.readouterr().err
