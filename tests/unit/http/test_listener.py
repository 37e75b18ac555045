from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from cellos.errors import ConfigError
from cellos.http import listener
from cellos.http.listener import inherited, listen

OURS = {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}


class TestListen:
    def test_it_takes_connections_and_is_not_inherited(self) -> None:
        with listen("127.0.0.1", 0) as listening:
            socket.create_connection(listening.getsockname(), 10).close()
            assert (listening.proto, listening.getblocking(), listening.get_inheritable()) == (socket.IPPROTO_TCP, False, False)

    def test_what_is_taken(self) -> None:
        with listen("127.0.0.1", 0) as first, pytest.raises(OSError, match="Address already in use"):
            listen(*first.getsockname())


class TestInherited:
    @pytest.fixture
    def first(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
        """Stands where descriptor 3 would be."""
        with socket.socket() as made:
            monkeypatch.setattr(listener, "_FIRST", made.fileno())
            yield made

    @pytest.mark.parametrize(
        "environment", [{}, {"LISTEN_FDS": "1"}, {"LISTEN_FDS": "1", "LISTEN_PID": "1"}, {"LISTEN_PID": str(os.getpid())}]
    )
    def test_none_or_one_for_another_process(self, environment: dict[str, str]) -> None:
        assert inherited(environment) is None

    def test_one_that_listens(self, first: socket.socket) -> None:
        first.bind(("127.0.0.1", 0))
        first.listen()
        first.set_inheritable(True)
        found = inherited(OURS)
        assert found is not None
        address = found.getsockname()
        assert (address, found.fileno(), found.proto) == (first.getsockname(), first.detach(), socket.IPPROTO_TCP)
        assert (found.getblocking(), found.get_inheritable()) == (False, False)
        found.close()

    @pytest.mark.parametrize("count", ["", "0", "2", "x"])
    def test_another_number_of_them(self, count: str) -> None:
        with pytest.raises(ConfigError, match=f"^LISTEN_FDS={count}: one socket is taken"):
            inherited(OURS | {"LISTEN_FDS": count})

    def test_no_socket_that_listens(self, first: socket.socket) -> None:
        with pytest.raises(ConfigError, match=r"is no TCP socket that listens$"):
            inherited(OURS)
        assert first.fileno() >= 0
        assert first.getsockname()[1] == 0, "it is left open for whoever owns it"

    def test_no_socket_at_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        descriptor = os.open(os.devnull, os.O_RDONLY)
        monkeypatch.setattr(listener, "_FIRST", descriptor)
        with pytest.raises(ConfigError, match=r"Socket operation on non-socket \(os error 88\)$"):
            inherited(OURS)
        os.close(descriptor)
