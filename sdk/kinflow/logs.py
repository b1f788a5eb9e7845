"""Structured logs: one line per event, on standard error.

    2026-01-31T12:00:00.000Z INFO kinflow.worker answered id=5f… exit=edge ms=3.2

`setup` is called by commands, once; the library itself only logs, to loggers named `kinflow…`.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from datetime import datetime, timezone
from typing import Any, Literal

Format = Literal["text", "json"]
LEVELS = ("debug", "info", "warning", "error")
LOGGERS = ("kinflow", "kinflow_edge", "kinflow_cloud", "kinflow_builder", "kinflow_bench")


class Event:
    """A log record's message: under another formatter, an app's own, it reads as in the text format."""

    def __init__(self, name: str, fields: dict[str, Any]) -> None:
        self.name = name
        self.fields = fields

    def __str__(self) -> str:
        return " ".join((self.name, *(f"{key}={_text(value)}" for key, value in self.fields.items())))


def event(logger: logging.Logger, level: int, name: str, **fields: Any) -> None:
    """Log one event. Fields keep their order; floats are rounded to 4 digits, bytes written as hex."""
    if logger.isEnabledFor(level):
        logger.log(level, Event(name, {key: _plain(value) for key, value in fields.items()}))


def setup(level: str = "warning", fmt: Format = "text") -> None:
    """Send kinflow's logs from `level` on, and everybody else's warnings, to standard error."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if fmt == "json" else TextFormatter())
    number = logging.getLevelName(level.upper())
    if not isinstance(number, int):
        raise ValueError(f"log level {level!r} is none of {', '.join(LEVELS)}")
    logging.basicConfig(handlers=[handler], level=max(number, logging.WARNING), force=True)
    for name in LOGGERS:
        logging.getLogger(name).setLevel(number)


class TextFormatter(logging.Formatter):
    """time LEVEL logger event key=value …"""

    def format(self, record: logging.LogRecord) -> str:
        return f"{_time(record)} {record.levelname} {record.name} {_event(record)}"


class JsonFormatter(logging.Formatter):
    """One JSON object: time, level, logger, event, and the event's own fields."""

    def format(self, record: logging.LogRecord) -> str:
        head = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
        }
        happened = _event(record)
        fields = happened.fields | head | {"event": happened.name}
        return json.dumps(fields, default=_plain, ensure_ascii=False)


def _event(record: logging.LogRecord) -> Event:
    """What others log counts as an event without fields; an exception becomes two fields."""
    if isinstance(record.msg, Event):
        happened = Event(record.msg.name, dict(record.msg.fields))
    else:
        happened = Event(record.getMessage().replace("\n", "\\n"), {})
    if record.exc_info and record.exc_info[1] is not None:
        happened.fields["error"] = repr(record.exc_info[1])
        happened.fields["trace"] = "".join(traceback.format_exception(*record.exc_info)).strip()
    return happened


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return round(value, 4)
    if isinstance(value, bytes):
        return value.hex()
    return value if isinstance(value, (int, str, list, dict, type(None))) else str(value)


def _text(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, default=_plain, ensure_ascii=False)
    if text == "" or any(character in text for character in ' "=\n\r\t'):
        return json.dumps(text, ensure_ascii=False)
    return text


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, timezone.utc)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
