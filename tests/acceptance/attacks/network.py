"""Attacks by sockets: what listens on the host, what lies beyond it, and families that no network namespace confines."""

from __future__ import annotations

import socket

from attempt import CLONE_NEWNET, empower, main, outcome

TIMEOUT_SECONDS = 3.0


def connect(host: str, port: str) -> object:
    """What a TCP listener says first."""
    with socket.create_connection((host, int(port)), TIMEOUT_SECONDS) as connection:
        return connection.recv(64).decode()


def connect_unix(name: str) -> object:
    """The same for a Unix socket: a path, or @name for an abstract one."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT_SECONDS)
        connection.connect("\0" + name[1:] if name.startswith("@") else name)
        return connection.recv(64).decode()


def datagram(host: str, port: str, text: str) -> object:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(text.encode(), (host, int(port)))
    return "sent"


def open_socket(family: str, kind: str, protocol: str) -> object:
    socket.socket(int(family), int(kind), int(protocol)).close()
    return "opened"


def open_socket_in_namespace(family: str, kind: str, protocol: str) -> object:
    """The same with the privileges over a network namespace of our own."""
    return {"namespace": outcome(empower, CLONE_NEWNET), "socket": outcome(open_socket, family, kind, protocol)}


def interfaces() -> object:
    return sorted(name for _, name in socket.if_nameindex())


if __name__ == "__main__":
    main(globals())
