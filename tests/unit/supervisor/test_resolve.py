from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from typing import Any

import pytest

from cellos.supervisor import resolve
from cellos.supervisor.resolve import addresses

V4 = (socket.AF_INET, socket.SOCK_STREAM, 6, "", ("192.0.2.1", 443))
V6 = (socket.AF_INET6, socket.SOCK_STREAM, 6, "", ("2001:db8::1", 443, 0, 0))
OTHER = (socket.AF_UNIX, socket.SOCK_STREAM, 0, "", "/path")


def answering(monkeypatch: pytest.MonkeyPatch, answer: Any) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def getaddrinfo(host: str, port: int, **how: Any) -> Any:
        asked.append((host, port, how))
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return asked


def test_every_answer_in_its_order(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = answering(monkeypatch, [V6, OTHER, V4])
    assert addresses("a.example", 443) == (
        {"address": "2001:db8::1", "family": "inet6", "port": 443},
        {"address": "192.0.2.1", "family": "inet", "port": 443},
    )
    assert asked == [("a.example", 443, {"type": socket.SOCK_STREAM})]


@pytest.mark.parametrize("error", [socket.gaierror(-2, "Name or service not known"), UnicodeError("label too long"), OSError(24, "files")])
def test_a_name_that_nobody_knows_has_none(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    answering(monkeypatch, error)
    assert addresses("a.example", 443) == ()


@pytest.fixture
def silence(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A name server that does not answer."""
    over, ended = threading.Event(), threading.Event()

    def getaddrinfo(host: str, port: int, **_: Any) -> Any:
        over.wait(30)
        ended.set()
        return [V4]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    yield
    over.set()
    assert ended.wait(30)


def test_nobody_waits_for_a_silent_server(monkeypatch: pytest.MonkeyPatch, silence: None) -> None:
    monkeypatch.setattr(resolve, "PATIENCE_SECONDS", 0.01)
    assert addresses("a.example", 443) == ()


def test_the_patience_is_bounded() -> None:
    assert 0 < resolve.PATIENCE_SECONDS <= 3
