"""The log: one JSON object per line on standard output: `timestamp`, `level`, `fields` (`message` and whatever belongs to it), `target`.

Fields are given as `extra={"fields": {...}}`. A record with a field that is named like a credential is dropped whole, as are the records
in which libraries show the bytes of requests.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import IO, Any

import msgspec

from cellos.core.ids import rfc3339

TRACE = 5
LEVELS: Mapping[str, int] = {
    "off": logging.CRITICAL + 10,
    "error": logging.ERROR,
    "warn": logging.WARNING,
    "info": logging.INFO,
    "debug": logging.DEBUG,
    "trace": TRACE,
}
CREDENTIALS = frozenset(
    {
        "authorization",
        "proxy-authorization",
        "cookie",
        "set-cookie",
        "x-amz-security-token",
        "x-vault-token",
        "x-api-key",
        "x-auth-token",
        "x-csrf-token",
        "authorization_header",
        "bearer_token",
        "access_token",
        "refresh_token",
        "id_token",
        "api_key",
        "session_token",
        "secret",
        "secret_value",
    }
)
_WIRE = ("uvicorn", "websockets", "httptools", "asyncio", "nats")
"""Libraries that would show what goes over the wire, headers included."""
_NAMES = {logging.WARNING: "WARN", logging.CRITICAL: "ERROR", TRACE: "TRACE"}


class JsonLines(logging.Formatter):
    """A record as one line."""

    def format(self, record: logging.LogRecord) -> str:
        """The line, without its end."""
        fields: dict[str, Any] = {"message": record.getMessage(), **getattr(record, "fields", {})}
        if record.exc_info:
            fields["error"] = self.formatException(record.exc_info)
        line = {
            "timestamp": rfc3339(int(record.created * 1e9)),
            "level": _NAMES.get(record.levelno, record.levelname),
            "fields": fields,
            "target": record.name,
        }
        return msgspec.json.encode(line, enc_hook=str).decode()


def may_be_shown(record: logging.LogRecord) -> bool:
    """Whether a record may be written at all."""
    if record.levelno <= logging.DEBUG and record.name.partition(".")[0] in _WIRE:
        return False
    fields: Mapping[str, Any] = getattr(record, "fields", {})
    return not any(name.lower() in CREDENTIALS for name in (*fields, *vars(record)))


def read_levels(text: str) -> dict[str, int]:
    """RUST_LOG: a level, or `target=level`, separated by commas; the key "" is everything else. What is not understood is left out."""
    levels = {"": logging.INFO}
    for part in text.split(","):
        target, equals, word = part.strip().rpartition("=")
        level = LEVELS.get(word.strip().lower())
        if level is not None:
            levels[target.strip().replace("::", ".") if equals else ""] = level
    return levels


def set_up_logging(text: str, stream: IO[str] | None = None) -> None:
    """Everything that is logged goes to `stream`, by default standard output, from the levels in `text` on."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(JsonLines())
    handler.addFilter(may_be_shown)
    levels = read_levels(text)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(levels.pop(""))
    logging.raiseExceptions = False  # a standard output that is gone must not end up as a traceback on standard error
    # Their lines at INFO say what ours say, or tell of each request.
    for name in ("uvicorn", "websockets", "nats", "asyncio"):
        logging.getLogger(name).setLevel(max(root.level, logging.WARNING))
    for target, level in levels.items():
        logging.getLogger(target).setLevel(level)
