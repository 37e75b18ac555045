"""The base URL of an HTTP export target: read so that no two readers can disagree about the host.

Stricter than the WHATWG algorithm that browsers follow: that one repairs what it meets (backslashes, blanks, missing slashes, percent signs
and octal numbers in hosts), and other libraries repair differently. Such a URL is refused.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import SplitResult, urlsplit

from cellos.core.documents.identifiers import ascii_lower

_DEFAULT_PORTS = {"http": 80, "https": 443}
# Schemes that, like http, always have a host.
_WITH_HOST = frozenset({"ftp", "ws", "wss"})
_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
# WHATWG's forbidden host code points; the rest of the host is letters, digits and marks.
_FORBIDDEN_IN_HOST = re.compile(r"[\x00-\x20\x7f#%/:<>?@\[\\\]^|]")
# IDNA 2003, which Python speaks, and UTS 46, which others speak, map these to different names.
_DISPUTED_IN_HOST = re.compile("[\u00df\u03c2\u200c\u200d]")


class BaseUrlError(ValueError):
    """The clause that follows the name of the member."""


class BaseUrl(NamedTuple):
    """`host` is in lower case, in punycode where it is not ASCII, an IPv6 address in brackets."""

    scheme: str
    host: str
    port: int


_NOT_ABSOLUTE = "must be an absolute http(s) base URL without query or fragment"
_OTHER_SCHEME = "must use http or https"


def parse_base_url(text: str) -> BaseUrl:
    """Scheme, host and port. Credentials, which some libraries accept in a URL, are passed over. Raises BaseUrlError."""
    found = _SCHEME.match(text)
    if found is None:
        raise BaseUrlError(_NOT_ABSOLUTE)
    scheme = ascii_lower(found[1])
    if scheme not in _DEFAULT_PORTS:
        if scheme in _WITH_HOST:
            _authority(text)
        raise BaseUrlError(_OTHER_SCHEME)
    if "?" in text or "#" in text:
        raise BaseUrlError(_NOT_ABSOLUTE)
    host, port = _authority(text)
    return BaseUrl(scheme, host, _DEFAULT_PORTS[scheme] if port is None else port)


def _authority(text: str) -> tuple[str, int | None]:
    if re.search(r"[\x00-\x20\x7f\\]", text):
        raise BaseUrlError(_NOT_ABSOLUTE)
    try:
        parts = urlsplit(text)
        host, port = _host(parts), parts.port
    except ValueError:
        raise BaseUrlError(_NOT_ABSOLUTE) from None
    return host, port


def _host(parts: SplitResult) -> str:
    """The normal form of a host. Raises ValueError."""
    from ipaddress import IPv4Address, IPv6Address

    written = parts.hostname or ""
    # The longest name that DNS can carry; the punycode of long text is slow.
    if len(written) > 253:
        raise ValueError(written)
    if "[" in parts.netloc:
        # Only an address may stand in brackets, and nothing but a port behind it.
        if not re.search(r"(?:^|@)\[[^\[\]%]*\](?::[0-9]*)?$", parts.netloc):
            raise ValueError(written)
        return f"[{IPv6Address(written).compressed}]"
    if not written.isascii():
        if _DISPUTED_IN_HOST.search(written):
            raise ValueError(written)
        written = written.encode("idna").decode()
    host = ascii_lower(written)
    if not host or _FORBIDDEN_IN_HOST.search(host):
        raise ValueError(host)
    last = host.removesuffix(".").rpartition(".")[2]
    if last.isdigit() or last.startswith("0x"):
        # A name that ends in a number is an address; spellings other than four decimals are read differently by different libraries.
        return str(IPv4Address(host))
    return host
