"""Where NATS is: the value of NATS_URL, read. Pure.

`[nats://|tls://][user:password@|token@]host[:port]`, several separated by commas and tried in that order. A host may be an IPv6 address in
brackets. User, password and token may be percent-encoded. Nothing that is printed ever holds them.
"""

from __future__ import annotations

from msgspec import Struct

from cellos.errors import ConfigError

DEFAULT_URL = "nats://127.0.0.1:4222"
DEFAULT_PORT = 4222
_SCHEMES = {"nats": False, "tls": True}


class Server(Struct, frozen=True, kw_only=True):
    """One address. `tls`: never talk to it in the clear."""

    host: str
    port: int = DEFAULT_PORT
    tls: bool = False
    user: str | None = None
    password: str | None = None
    token: str | None = None

    @property
    def shown(self) -> str:
        """The address without credentials."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'tls' if self.tls else 'nats'}://{host}:{self.port}"

    def __repr__(self) -> str:
        """Without credentials, too: a representation ends up in logs."""
        return f"Server({self.shown})"


def read_servers(url: str) -> tuple[Server, ...]:
    """The servers that a URL list names. Raises ConfigError, which quotes no credentials."""
    entries = [entry.strip() for entry in url.split(",")]
    return tuple(_read_server(entry, number if len(entries) > 1 else 0) for number, entry in enumerate(entries, 1))


def shown_url(url: str) -> str:
    """A NATS_URL for people: without credentials; `(unreadable)` where it cannot be read."""
    try:
        return ",".join(server.shown for server in read_servers(url))
    except ConfigError:
        return "(unreadable)"


def _read_server(entry: str, number: int) -> Server:
    where = f"NATS_URL, entry {number}" if number else "NATS_URL"
    scheme, separator, rest = entry.partition("://")
    if not separator:
        scheme, rest = "nats", entry
    if scheme.lower() not in _SCHEMES:
        raise ConfigError(f"{where}: the scheme {scheme[:20]!r} is not known; known: {', '.join(f'{name}://' for name in _SCHEMES)}")
    userinfo, has_userinfo, address = rest.rpartition("@")
    address = address.split("/", 1)[0]
    host, port = _split_address(address, where)
    user = password = token = None
    if has_userinfo and userinfo:
        name, colon, secret = userinfo.partition(":")
        if colon:
            user, password = _decoded(name), _decoded(secret)
        else:
            token = _decoded(name)
    return Server(host=host, port=port, tls=_SCHEMES[scheme.lower()], user=user, password=password, token=token)


def _split_address(address: str, where: str) -> tuple[str, int]:
    if address.startswith("["):
        host, bracket, after = address[1:].partition("]")
        if not bracket or (after and not after.startswith(":")):
            raise ConfigError(f"{where}: an IPv6 address is written [address]:port")
        port = after[1:]
    else:
        host, _, port = address.partition(":")
        if ":" in port:
            raise ConfigError(f"{where}: an IPv6 address is written [address]:port")
    if not host or any(character.isspace() or not character.isprintable() for character in host):
        raise ConfigError(f"{where}: names no host; example: {DEFAULT_URL}")
    if not port:
        return host, DEFAULT_PORT
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise ConfigError(f"{where}: the port is no number from 1 to 65535")
    return host, int(port)


def _decoded(text: str) -> str:
    if "%" not in text:
        return text
    from urllib.parse import unquote

    return unquote(text)
