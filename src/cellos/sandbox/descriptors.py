"""Receiving descriptors over a Unix socket, closed on exec from the first moment."""

from __future__ import annotations

import array
import socket


def receive(channel: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes and `most` descriptors; empty bytes at end of file.

    socket.recv_fds of Python 3.11 will not do: it drops the close-on-exec flag.
    """
    item = array.array("i").itemsize
    data, ancillary, _, _ = channel.recvmsg(size, socket.CMSG_SPACE(most * item), socket.MSG_CMSG_CLOEXEC)
    received = array.array("i")
    for level, kind, content in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            received.frombytes(content[: len(content) - len(content) % item])
    return data, list(received)
