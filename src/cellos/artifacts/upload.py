"""Artifacts by HTTP PUT: one file, streamed, with a length, retried where another try may help.

A file is never in memory as a whole. An attempt is bounded by the time-outs, and only a 2xx answer means that the file was stored. What is
said of a failure never holds a query, a password or a token, not even where the server's answer repeats them.
"""

from __future__ import annotations

import io
import re
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, BinaryIO, Literal

from msgspec import Struct

from cellos.artifacts.files import check_artifact_name, check_cell_segment
from cellos.core.documents.base_url import BaseUrlError, parse_base_url
from cellos.core.urls import redact_known, without_credentials
from cellos.errors import ExportError, os_error_text

if TYPE_CHECKING:
    import httpx2

Kind = Literal["http", "s3"]

LABEL: Mapping[Kind, str] = {"http": "HTTP", "s3": "S3"}
LONGEST_PAUSE_SECONDS = 30.0
"""What a server may ask for by Retry-After."""
MOST_OF_AN_ANSWER = 512
"""Bytes of an answer that go into an error."""

_READ_OF_AN_ANSWER = 1 << 14
_CHUNK = 1 << 16
_RETRIED = frozenset({408, 425, 429, *range(500, 600)})
# Shorter values of a query (`300`, `host`) are no secrets, and are parts of innocent words.
_SHORTEST_SECRET_VALUE = 8


class Retries(Struct, frozen=True, kw_only=True):
    """How often to try, and how long to wait in between."""

    max_attempts: int = 1
    backoff_ms: int = 0


class Upload:
    """What PUTs files for one store. Opens its client at the first use, or by `open`."""

    def __init__(
        self,
        kind: Kind,
        environment: Mapping[str, str],
        *,
        retries: Retries = Retries(),  # noqa: B008  # frozen
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        if retries.max_attempts < 1:
            raise ExportError(f"{LABEL[kind]} export max_attempts must be at least 1")
        self.kind: Kind = kind
        self._environment = environment
        self._retries = retries
        self._sleep = sleep
        self._client: httpx2.Client | None = None

    def open(self) -> httpx2.Client:
        """Raises ConfigError: for the trust store, a proxy."""
        if self._client is None:
            from cellos import http

            timeout_ms, connect_timeout_ms = http.timeouts(self._environment, f"CELLOS_EXPORT_{LABEL[self.kind]}")
            self._client = http.client(self._environment, timeout_ms=timeout_ms, connect_timeout_ms=connect_timeout_ms)
        return self._client

    def close(self) -> None:
        if self._client is not None:
            self._client.close()
            self._client = None

    def put(self, url: str, source: BinaryIO, *, name: str, content_type: str | None = None, token: str | None = None) -> int:
        """Store the whole of `source` at `url`; its length. Raises ExportError after the last attempt."""
        length = _length(source, name)
        headers = {"Content-Length": str(length)}
        if content_type is not None:
            if not re.fullmatch(r"[ -~]+", content_type):
                raise ExportError(f'artifact "{name}": its contentType is not printable ASCII, so it cannot be sent')
            headers["Content-Type"] = content_type
        shown = without_credentials(url)
        for attempt in range(1, self._retries.max_attempts + 1):
            last = attempt == self._retries.max_attempts
            pause = self._attempt(url, shown, source, length, headers, name=name, token=token, last=last)
            if pause is None:
                break
            self._sleep(pause)
        return length

    def _attempt(
        self, url: str, shown: str, source: BinaryIO, length: int, headers: Mapping[str, str], *, name: str, token: str | None, last: bool
    ) -> float | None:
        """None where it was stored, else the seconds to wait before the next attempt."""
        import httpx2

        from cellos.http import fault_text, read_body

        def bearer(request: httpx2.Request) -> httpx2.Request:
            request.headers["Authorization"] = f"Bearer {token}"
            return request

        pause = self._retries.backoff_ms / 1000
        try:
            with self.open().stream(
                "PUT",
                url,
                content=_Body(source, length, name),
                headers=headers,
                # Without a token, a user and password in the URL are sent (RFC 7617).
                auth=None if token is None else bearer,
            ) as answer:
                if answer.is_success:
                    return None
                if not last and answer.status_code in _RETRIED:
                    return max(pause, _retry_after(answer.headers.get("Retry-After", "")))
                text = _quoted(read_body(answer, _READ_OF_AN_ANSWER), url, token)
                raise ExportError(f"{self.kind} put {shown} returned {answer.status_code}: {text}")
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            if not last and isinstance(error, httpx2.TransportError):
                return pause
            raise ExportError(f"{self.kind} put {shown}: {_quoted(fault_text(error).encode(), url, token)}") from None


class _Body:
    """A source from its beginning, anew for every attempt."""

    def __init__(self, source: BinaryIO, length: int, name: str) -> None:
        self._source = source
        self._left = length
        self._name = name

    def __iter__(self) -> Iterator[bytes]:
        try:
            self._source.seek(0)
            while self._left:
                chunk = self._source.read(min(_CHUNK, self._left))
                if not chunk:
                    raise ExportError(f"read artifact {self._name}: it became shorter while it was read")
                self._left -= len(chunk)
                yield chunk
        except OSError as error:
            raise ExportError(f"read artifact {self._name}: {os_error_text(error)}") from error


def _length(source: BinaryIO, name: str) -> int:
    try:
        return source.seek(0, io.SEEK_END)
    except io.UnsupportedOperation as error:
        raise ExportError(f"read artifact {name}: it cannot be read twice, as a retry would have to; give a regular file") from error
    except OSError as error:
        raise ExportError(f"read artifact {name}: {os_error_text(error)}") from error


def _retry_after(value: str) -> float:
    """Seconds (RFC 9110, 10.2.3); a date is not followed, as our clock need not be the server's."""
    return min(float(value), LONGEST_PAUSE_SECONDS) if re.fullmatch(r"[0-9]{1,9}", value.strip()) else 0.0


def _quoted(body: bytes, url: str, token: str | None) -> str:
    """The beginning of what a server said, fit for an event and a terminal."""
    secrets = _secrets(url, token)
    text = body.decode(errors="replace")
    if len(body) == _READ_OF_AN_ANSWER:
        text = _without_cut_off(text.rstrip("\ufffd"), secrets)
    text = redact_known(text, secrets)
    text = "".join(char if char.isprintable() else char.encode("unicode_escape").decode() for char in text.rstrip())
    return text.encode()[:MOST_OF_AN_ANSWER].decode(errors="ignore")


def _without_cut_off(text: str, secrets: set[str]) -> str:
    """`text` without the beginning of a secret at its end, where reading stopped."""
    longest = max((size for secret in secrets for size in range(1, len(secret)) if text.endswith(secret[:size])), default=0)
    return text[: len(text) - longest]


def _secrets(url: str, token: str | None) -> set[str]:
    """Everything in a request that may not be repeated, in the forms in which servers repeat it."""
    from base64 import b64encode
    from urllib.parse import unquote, unquote_plus, urlsplit

    parts = urlsplit(url)
    found = {url, parts.query}
    for item in parts.query.split("&"):
        value = item.partition("=")[2]
        found |= {form for form in (value, unquote(value), unquote_plus(value)) if len(form) >= _SHORTEST_SECRET_VALUE}
    if parts.password:
        userinfo = parts.netloc.rpartition("@")[0]
        pair = f"{unquote(parts.username or '')}:{unquote(parts.password)}"
        found |= {userinfo, parts.password, unquote(parts.password), b64encode(pair.encode()).decode()}
    if token:
        found.add(token)
    found |= {text.replace("&", form) for text in (url, parts.query) for form in ("&amp;", "\\u0026")}
    return found - {""}


def check_url(url: str, *, what: str) -> str:
    """`url` without blanks around it, where it is an absolute http(s) URL. Raises ExportError, which does not hold it."""
    url = url.strip()
    if not url:
        raise ExportError(f"{what} is empty after trim")
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*):", url)
    if scheme is None:
        raise ExportError(f"invalid {what}: relative URL without a base")
    if scheme[1].lower() not in ("http", "https"):
        raise ExportError(f"{what} scheme must be http or https, got {scheme[1].lower()}")
    base, _, rest = url.partition("?")
    authority = re.split(r"[/?#]", url.partition("://")[2], maxsplit=1)[0]
    if "#" in url or not re.fullmatch(r"[!-~]*", rest):
        raise ExportError(f"invalid {what}: a fragment, blanks and control characters cannot be sent")
    if "{" in authority:
        raise ExportError(f"invalid {what}: placeholders may stand in the path and query, not in the host")
    try:
        parse_base_url(base)
    except BaseUrlError:
        raise ExportError(f"invalid {what}: it needs a host, and a port between 0 and 65535 if any") from None
    return url


def check_segments(cell_id: str, name: str) -> None:
    """What would lead elsewhere as a part of a path. Separators do not: they are replaced. Raises ExportError."""
    check_cell_segment(cell_id)
    check_artifact_name(name.replace("/", "_").replace("\\", "_"))


def fill(url: str, cell_id: str, name: str) -> str:
    """`url` with its placeholders `{cell_id}` and `{artifact_name}` filled in."""
    return url.replace("{cell_id}", encoded(cell_id)).replace("{artifact_name}", encoded(name))


def has_placeholder(url: str) -> bool:
    return "{cell_id}" in url or "{artifact_name}" in url


def encoded(text: str) -> str:
    """One segment of a path or one value of a query: separators of paths become `_`."""
    from urllib.parse import quote

    return quote(re.sub(r"[/\\]", "_", text), safe="")
