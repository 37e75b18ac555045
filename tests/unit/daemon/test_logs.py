from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from cellos.daemon.logs import CREDENTIALS, read_levels, set_up_logging


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """The root logger, put back afterwards."""
    root = logging.getLogger()
    before = (root.handlers[:], root.level, logging.raiseExceptions)
    text = io.StringIO()
    yield text
    root.handlers[:], level, logging.raiseExceptions = before
    root.setLevel(level)
    for name in ("uvicorn", "websockets", "nats", "asyncio", "uvicorn.error", "cellos.a"):
        logging.getLogger(name).setLevel(logging.NOTSET)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line(stream: io.StringIO) -> None:
    set_up_logging("", stream)
    logging.getLogger("cellos.a").warning("told\nonce", extra={"fields": {"cursor": 7, "what": ["é"]}})
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "fields", "target"]
    assert line["timestamp"].endswith("+00:00")
    assert (line["level"], line["target"]) == ("WARN", "cellos.a")
    assert line["fields"] == {"message": "told\nonce", "cursor": 7, "what": ["é"]}


def test_an_exception_is_one_line(stream: io.StringIO) -> None:
    set_up_logging("", stream)
    try:
        raise RuntimeError("why")
    except RuntimeError:
        logging.getLogger("cellos.a").exception("broken")
    (line,) = lines(stream)
    assert (line["level"], "RuntimeError: why" in line["fields"]["error"]) == ("ERROR", True)


@pytest.mark.parametrize("name", [*sorted(CREDENTIALS), "Authorization", "X-API-Key"])
def test_a_record_that_names_a_credential_is_dropped(stream: io.StringIO, name: str) -> None:
    set_up_logging("trace", stream)
    logging.getLogger("cellos.a").error("shown", extra={"fields": {name: "s3cr3t"}})
    if name.isidentifier():
        logging.getLogger("cellos.a").error("shown", extra={name: "s3cr3t"})
    logging.getLogger("cellos.a").error("kept", extra={"fields": {"author": "a"}})
    assert [line["fields"]["message"] for line in lines(stream)] == ["kept"]


@pytest.mark.parametrize("setting", ["trace", "debug", "trace,uvicorn=trace,websockets=debug"])
def test_bytes_of_requests_are_never_shown(stream: io.StringIO, setting: str) -> None:
    set_up_logging(setting, stream)
    for name in ("uvicorn.error", "websockets.server", "nats.aio.client"):
        logging.getLogger(name).debug("> Authorization: Bearer s3cr3t")
        logging.getLogger(name).log(5, "Bearer s3cr3t")
    assert "s3cr3t" not in stream.getvalue()


@pytest.mark.parametrize(
    ("text", "levels"),
    [
        ("", {"": logging.INFO}),
        ("WARN", {"": logging.WARNING}),
        ("error,cellos::server=debug", {"": logging.ERROR, "cellos.server": logging.DEBUG}),
        ("nonsense,x=nonsense", {"": logging.INFO}),
        ("off", {"": logging.CRITICAL + 10}),
    ],
)
def test_levels(text: str, levels: dict[str, int]) -> None:
    assert read_levels(text) == levels
