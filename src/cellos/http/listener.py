"""Where a server listens: a socket that it opens, or one that it was started with.

The second is the convention of systemd, sd_listen_fds(3): the socket is descriptor 3, LISTEN_FDS says how many there are, and LISTEN_PID
who they are for. Whoever hands it over keeps it open, so that clients wait while the server is started again, instead of being refused.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping

from cellos.errors import ConfigError, os_error_text

FDS, PID = "LISTEN_FDS", "LISTEN_PID"
BACKLOG = 2048
_FIRST = 3


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens there, for port 0 at one that the system chooses. Raises OSError."""
    family, _, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # With its protocol named: asyncio sets TCP_NODELAY on no other, and a body would wait 40 ms behind its head.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def inherited(environment: Mapping[str, str]) -> socket.socket | None:
    """The socket that this process was started with; None where there is none, or where it is for another process. Raises ConfigError."""
    if environment.get(PID) != str(os.getpid()) or FDS not in environment:
        return None
    if environment[FDS] != "1":
        raise ConfigError(f"{FDS}={environment[FDS]}: one socket is taken, that of the API; hand over no other")
    try:
        listener = socket.socket(fileno=_FIRST)
    except OSError as error:
        raise ConfigError(f"{FDS}=1: descriptor {_FIRST}: {os_error_text(error)}") from error
    if listener.family not in {socket.AF_INET, socket.AF_INET6} or not listener.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
        listener.detach()
        raise ConfigError(f"{FDS}=1: descriptor {_FIRST} is no TCP socket that listens")
    listener.set_inheritable(False)
    listener.setblocking(False)
    return listener
