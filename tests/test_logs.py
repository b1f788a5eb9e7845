"""One line per event, in two formats."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator

import pytest

from kinflow import logs

log = logging.getLogger("kinflow.testing-logs")


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    for name in logs.LOGGERS:
        logging.getLogger(name).setLevel(logging.NOTSET)


def test_text_is_one_line_of_keys_and_values(capsys: pytest.CaptureFixture[str]) -> None:
    """Words stand bare; what holds spaces, quotes or line ends is quoted, so that the line stays one line."""
    logs.setup("info")
    logs.event(log, logging.INFO, "answered", id=b"\x01\xff", exit="edge", ms=1.23456, why='a "b"\nc', none=None)
    line = capsys.readouterr().err
    when, rest = line.split(" ", 1)
    assert when.endswith("Z")
    assert rest == ('INFO kinflow.testing-logs answered id=01ff exit=edge ms=1.2346 why="a \\"b\\"\\nc" none=null\n')


def test_json_is_one_object_per_line(capsys: pytest.CaptureFixture[str]) -> None:
    """Numbers stay numbers, and a field cannot take the place of the event's own name."""
    logs.setup("debug", "json")
    logs.event(log, logging.DEBUG, "busy", queue_ms=2.5, nodes=["a"], event="forged")
    record = json.loads(capsys.readouterr().err)
    assert record.pop("time")
    assert record == {
        "level": "debug",
        "logger": "kinflow.testing-logs",
        "event": "busy",
        "queue_ms": 2.5,
        "nodes": ["a"],
    }


@pytest.mark.parametrize("fmt", ["text", "json"])
def test_an_exception_stays_on_the_line(fmt: logs.Format, capsys: pytest.CaptureFixture[str]) -> None:
    """A traceback of many lines would break every reader of the log."""
    logs.setup("info", fmt)
    try:
        raise OSError("gone")
    except OSError:
        log.exception("died")
    out = capsys.readouterr().err
    assert out.count("\n") == 1
    assert "OSError" in out
    assert "test_logs.py" in out


def test_quiet_by_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Information is not shown unless asked for, and other libraries' never."""
    logs.setup()
    logs.event(log, logging.INFO, "answered")
    assert capsys.readouterr().err == ""
    logs.setup("debug")
    logging.getLogger("somebody.else").info("chatter")
    assert capsys.readouterr().err == ""
    logging.getLogger("somebody.else").warning("trouble")
    assert "trouble" in capsys.readouterr().err


def test_an_app_with_logging_of_its_own_sees_the_fields(caplog: pytest.LogCaptureFixture) -> None:
    """The SDK is a guest: its events read well under any formatter."""
    with caplog.at_level(logging.INFO, "kinflow"):
        logs.event(log, logging.INFO, "answered", exit="edge", ms=3)
    assert caplog.messages == ["answered exit=edge ms=3"]
