"""Which proxy a request goes through, by the variables that other programs follow: HTTP_PROXY, HTTPS_PROXY, NO_PROXY.

The spelling in small letters goes first. (Unlike curl, HTTP_PROXY in capitals counts.) NO_PROXY is a list of names (with everything below
them), addresses and networks, each with a port or without; `*` is everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address, ip_network

from cellos.core.urls import without_credentials
from cellos.errors import ConfigError


def proxies(environment: Mapping[str, str]) -> dict[str, str]:
    """Scheme of a request to URL of its proxy. Raises ConfigError for one that we cannot use."""
    found = {}
    for scheme in ("http", "https"):
        name = next((name for name in (f"{scheme}_proxy", f"{scheme}_proxy".upper()) if environment.get(name, "").strip()), None)
        if name is not None:
            found[scheme] = _proxy(name, environment[name].strip())
    return found


def _proxy(name: str, text: str) -> str:
    from urllib.parse import urlsplit

    url = text if "://" in text else f"http://{text}"
    try:
        parts = urlsplit(url)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    if not usable:
        raise ConfigError(f"{name}: {without_credentials(url)!r} is not the URL of an HTTP proxy; give http://host:port")
    return url


def goes_direct(environment: Mapping[str, str], host: str, port: int) -> bool:
    """Whether NO_PROXY names the host. Entries that make no sense match nothing."""
    listed = environment.get("no_proxy", "").strip() or environment.get("NO_PROXY", "")
    return any(_matches(entry.strip().lower(), host.lower().strip("[]").rstrip("."), port) for entry in listed.split(","))


def _matches(entry: str, host: str, port: int) -> bool:
    if entry == "*":
        return True
    name, separator, last = entry.rpartition(":")
    # More colons than one, and no bracket before the last: an IPv6 address without a port.
    if separator and last.isdigit() and (":" not in name or name.endswith("]")):
        if int(last) != port:
            return False
        entry = name
    entry = entry.strip("[]").removeprefix("*").removeprefix(".").rstrip(".")
    if not entry:
        return False
    try:
        return ip_address(host) in ip_network(entry, strict=False)
    except ValueError:
        return host == entry or host.endswith(f".{entry}")
