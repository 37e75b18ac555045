"""Descriptors over a Unix socket, closed on exec from the first moment.

Built on the C module: `socket` itself costs a one-shot run 2 ms, and its recv_fds of Python 3.11 drops the close-on-exec flag.
"""

from __future__ import annotations

import _socket
import array
from collections.abc import Sequence

_ITEM = array.array("i").itemsize


def send(channel: _socket.socket, data: bytes, descriptors: Sequence[int]) -> int:
    """Send `descriptors` with the first bytes of `data`; how many bytes went. Raises OSError."""
    if not descriptors:
        return channel.send(data)
    return channel.sendmsg([data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", descriptors))])


def receive(channel: _socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes and `most` descriptors; empty bytes at end of file. Raises OSError."""
    data, ancillary, _, _ = channel.recvmsg(size, _socket.CMSG_SPACE(most * _ITEM), _socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % _ITEM])
    return data, list(received)
