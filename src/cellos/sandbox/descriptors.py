"""Descriptors over a Unix socket, closed on exec from the first moment.

Built on the C module: `socket` itself costs a one-shot run 2 ms, and its recv_fds of Python 3.11 drops the close-on-exec flag.
"""

from __future__ import annotations

import _socket
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence  # the launcher would load `collections` for it

_ITEM = 4
"""Bytes of a descriptor, an int of C; `array` would load `collections`, `struct` itself."""


def send(channel: _socket.socket, data: bytes, descriptors: Sequence[int]) -> int:
    """Send `descriptors` with the first bytes of `data`; how many bytes went. Raises OSError."""
    if not descriptors:
        return channel.send(data)
    return channel.sendmsg(
        [data], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, b"".join(number.to_bytes(_ITEM, sys.byteorder) for number in descriptors))]
    )


def receive(channel: _socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes and `most` descriptors; empty bytes at end of file. Raises OSError."""
    data, ancillary, _, _ = channel.recvmsg(size, _socket.CMSG_SPACE(most * _ITEM), _socket.MSG_CMSG_CLOEXEC)
    received: list[int] = []
    for level, kind, content in ancillary:
        if level == _socket.SOL_SOCKET and kind == _socket.SCM_RIGHTS:
            received += memoryview(content)[: len(content) // _ITEM * _ITEM].cast("i").tolist()
    return data, received
