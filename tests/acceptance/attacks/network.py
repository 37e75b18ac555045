"""Attacks by sockets: what listens on the host, what lies beyond it, and families that no network namespace confines."""

from __future__ import annotations

import socket
import struct

from attempt import CLONE_NEWNET, empower, main, outcome, syscall

TIMEOUT_SECONDS = 30.0


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


def out_of_band() -> object:
    """Bytes of TCP's urgent data that we send to ourselves."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        return sender.send(b"x", socket.MSG_OOB)


def decapsulate() -> object:
    """Let the kernel take IPsec out of our datagrams (UDP_ENCAP_ESPINUDP of udp(7))."""
    udp_encap, esp_in_udp = 100, 2
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        return receiver.setsockopt(socket.IPPROTO_UDP, udp_encap, esp_in_udp)


def stack_protocol() -> object:
    """Whether the kernel looks for the protocol that we want on top of TCP (TCP_ULP); ENOENT is its answer where it has none."""
    tcp_ulp = 31
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as sender:
        return outcome(sender.setsockopt, socket.IPPROTO_TCP, tcp_ulp, b"tls") in {"done", "ENOENT"}


def bridge_version() -> object:
    """Ask about bridges: the kernel loads its module for that, whoever asks."""
    sioc_get_bridge, get_version = 0x8940, 0
    with socket.socket() as any_socket:
        return syscall(16, any_socket.fileno(), sioc_get_bridge, struct.pack("3L", get_version, 0, 0))


def interfaces() -> object:
    return sorted(name for _, name in socket.if_nameindex())


if __name__ == "__main__":
    main(globals())
