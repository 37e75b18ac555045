"""What this host's resolver says of a name: for the record only, nothing is enforced by it."""

import _thread
import socket
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE_SECONDS = 3.0
_FAMILIES = {socket.AF_INET: "inet", socket.AF_INET6: "inet6"}


def addresses(host: str, port: int) -> Sequence[Mapping[str, Any]]:
    """Address, family and port of each answer, in the resolver's order. Empty where it has none, or none within three seconds."""
    found: list[Mapping[str, Any]] = []
    done = _thread.allocate_lock()
    done.acquire()

    def ask() -> None:
        try:
            for family, _, _, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
                if family in _FAMILIES:
                    found.append({"address": place[0], "family": _FAMILIES[family], "port": port})
        except (OSError, UnicodeError):
            pass  # no such name, no server: there are no addresses
        finally:
            done.release()

    # getaddrinfo has no time-out; a thread that hangs in it ends with the process.
    _thread.start_new_thread(ask, ())
    return tuple(found) if done.acquire(timeout=PATIENCE_SECONDS) else ()
