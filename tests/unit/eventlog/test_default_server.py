from __future__ import annotations

import socket

from cellos.eventlog.default_server import default_server_listens


def test_somebody_listens_or_nobody() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = listener.getsockname()
        assert default_server_listens(address)
    assert not default_server_listens(address)
