"""HTTP as we speak it to others: to whom we trust, for how long, through which proxy.

`client` makes an httpx2 client with the system's trust store and CELLOS_CA_BUNDLE, the proxies of an environment that is given, TLS 1.2 or
later, no redirects (they would carry credentials and files to somewhere nobody declared), and one limit on a whole request: a server
that sends a byte now and then holds nobody up. Nothing here is imported before somebody needs HTTP: that costs 120 ms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from cellos.core.urls import without_credentials as without_credentials  # offered here too
from cellos.errors import ConfigError, os_error_text

if TYPE_CHECKING:
    import ssl

    import httpx2

CA_BUNDLE = "CELLOS_CA_BUNDLE"
TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_MS = 10_000

_U64 = 1 << 64
# Eleven days. The kernel's and Python's own limits on waiting are lower than 64 bits of milliseconds.
_LONGEST_SECONDS = 1e6
_CERTIFICATE = re.compile(rb"-----BEGIN CERTIFICATE-----.*?(?:-----END CERTIFICATE-----|\Z)", re.DOTALL)
# Where distributions keep the store, for a Python that was built for another one.
_STORES = ("/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/cert.pem", "/etc/ssl/ca-bundle.pem", "/etc/ssl/cert.pem")


def client(environment: Mapping[str, str], *, timeout_ms: int, connect_timeout_ms: int) -> httpx2.Client:
    """A client; close it. `timeout_ms` bounds each request from its start to the last byte of its answer. Raises ConfigError.

    What a request raises is an httpx2.HTTPError; `fault_text` has its words.
    """
    context = trust(environment)
    import httpx2

    from cellos.http.transport import Transport

    seconds, connect_seconds = (min(limit / 1000, _LONGEST_SECONDS) for limit in (timeout_ms, connect_timeout_ms))
    return httpx2.Client(
        transport=Transport(environment, context, seconds=seconds),
        timeout=httpx2.Timeout(seconds, connect=connect_seconds),
        follow_redirects=False,
        trust_env=False,
        # An answer that is not compressed is as long as it looks.
        headers={"Accept-Encoding": "identity", "User-Agent": "cellos"},
    )


def read_body(response: httpx2.Response, most: int) -> bytes:
    """The first `most` bytes of the body of a streamed response. Ask for one more than fits to see that it does not fit."""
    body = b""
    for chunk in response.iter_raw():
        body += chunk
        if len(body) >= most:
            break
    return body[:most]


def fault_text(error: Exception) -> str:
    """Why a request failed, without its URL: the operating system's words where it was that. With the proxy, where there was one."""
    return _why(error) + "".join(f" ({note})" for note in getattr(error, "__notes__", ()))


def _why(error: Exception) -> str:
    import ssl

    cause: BaseException | None = error
    while cause is not None:
        # A failure of TLS is an OSError too, but its number is not the system's.
        if isinstance(cause, OSError) and not isinstance(cause, ssl.SSLError) and cause.strerror:
            # Numbers of the resolver are negative.
            return os_error_text(cause) if cause.errno and cause.errno > 0 else cause.strerror
        cause = cause.__cause__ or cause.__context__
    return re.sub(r" \(_ssl\.c:[0-9]+\)$", "", str(error)) or type(error).__name__


def timeouts(
    environment: Mapping[str, str], prefix: str, *, timeout_ms: int = TIMEOUT_MS, connect_timeout_ms: int = CONNECT_TIMEOUT_MS
) -> tuple[int, int]:
    """`<prefix>_TIMEOUT_MS` and `<prefix>_CONNECT_TIMEOUT_MS`. What is not a positive integer of 64 bits is the default."""
    return (
        _positive(environment.get(f"{prefix}_TIMEOUT_MS"), timeout_ms),
        _positive(environment.get(f"{prefix}_CONNECT_TIMEOUT_MS"), connect_timeout_ms),
    )


def _positive(text: str | None, default: int) -> int:
    text = (text or "").strip()
    if not re.fullmatch(r"\+?[0-9]{1,30}", text):
        return default
    value = int(text)
    return value if 0 < value < _U64 else default


def trust(environment: Mapping[str, str]) -> ssl.SSLContext:
    """Whom we believe: the system's store, and the certificates of CELLOS_CA_BUNDLE. Raises ConfigError."""
    import os
    import ssl

    context = ssl.create_default_context()
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    default = ssl.get_default_verify_paths()
    if not (default.cafile or default.capath):
        store = next(filter(os.path.isfile, _STORES), None)
        if store is not None:
            context.load_verify_locations(store)
    path = environment.get(CA_BUNDLE, "").strip()
    if path:
        _add(context, path)
    return context


def _add(context: ssl.SSLContext, path: str) -> None:
    import ssl

    try:
        with open(path, "rb") as file:
            found = _CERTIFICATE.findall(file.read())
    except OSError as error:
        raise ConfigError(f"{CA_BUNDLE}: read {path}: {os_error_text(error)}") from error
    if not found:
        raise ConfigError(f"{CA_BUNDLE}: no certificates found in {path}")
    try:
        for certificate in found:
            context.load_verify_locations(cadata=ssl.PEM_cert_to_DER_cert(certificate.decode("ascii")))
    except (ValueError, ssl.SSLError) as error:
        raise ConfigError(f"{CA_BUNDLE}: parse cert in {path}: {error}") from error
