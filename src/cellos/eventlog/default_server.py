"""Whether there is a NATS server where it is by default, asked by whoever was not told where it is.

A module of its own, because the answer is mostly no: then nothing else of NATS is loaded.
"""

from __future__ import annotations

import _socket

DEFAULT_ADDRESS = ("127.0.0.1", 4222)
_SECONDS = 0.2


def default_server_listens(address: tuple[str, int] = DEFAULT_ADDRESS) -> bool:
    """Whether anything takes connections there. A loopback connection that is refused costs next to nothing."""
    probe = _socket.socket(_socket.AF_INET, _socket.SOCK_STREAM)
    try:
        probe.settimeout(_SECONDS)
        probe.connect(address)
    except OSError:
        return False
    finally:
        probe.close()
    return True
