"""The way of a request to its server, with one deadline for all of it.

httpx2 counts a time-out for each single operation; a server that answers byte by byte would never meet it. Here each operation gets
at most what is left of the request's own time. (Looking up a name is the exception: the resolver has time-outs of its own.)
"""

from __future__ import annotations

import socket
import ssl
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from http import HTTPStatus
from typing import Any
from urllib.parse import unquote, urlsplit

import httpcore2
import httpx2

from cellos.core.urls import without_credentials
from cellos.http.proxies import goes_direct, proxies

_PORTS = {"http": 80, "https": 443}
# A socket's buffer takes this much at once, so that one write does not become many, each with the time of one.
_PIECE = 1 << 14
# RFC 9110, 15.5.8: of a proxy, never of the server. As to CONNECT, it is no answer.
_FROM_THE_PROXY = 407


class Transport(httpx2.BaseTransport):
    """What an httpx2 client sends requests with. One request at a time in each thread; its answer is read in the same thread."""

    def __init__(self, environment: Mapping[str, str], context: ssl.SSLContext, *, seconds: float) -> None:
        self._environment = dict(environment)
        self._deadline = _Deadline(seconds)
        network = _Network(self._deadline)
        self._direct = httpcore2.ConnectionPool(ssl_context=context, network_backend=network)
        found = proxies(environment)
        self._proxies = {scheme: _proxy(url, context, network) for scheme, url in found.items()}
        self._shown = {scheme: without_credentials(url) for scheme, url in found.items()}

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        url = request.url
        pool = self._proxies.get(url.scheme, self._direct)
        if pool is not self._direct and goes_direct(self._environment, url.host, url.port or _PORTS[url.scheme]):
            pool = self._direct
        proxy = None if pool is self._direct else self._shown[url.scheme]
        self._deadline.start()
        assert isinstance(request.stream, httpx2.SyncByteStream)
        with _as_httpx2(proxy):
            answer = pool.handle_request(
                httpcore2.Request(
                    method=request.method,
                    url=httpcore2.URL(scheme=url.raw_scheme, host=url.raw_host, port=url.port, target=url.raw_path),
                    headers=request.headers.raw,
                    content=request.stream,
                    extensions=request.extensions,
                )
            )
            if proxy is not None and answer.status == _FROM_THE_PROXY:
                answer.close()
                raise httpcore2.ProxyError(f"{answer.status} {HTTPStatus(answer.status).phrase}")
        assert isinstance(answer.stream, Iterable)
        return httpx2.Response(answer.status, headers=answer.headers, stream=_Body(answer), extensions=answer.extensions)

    def close(self) -> None:
        for pool in (self._direct, *self._proxies.values()):
            pool.close()


class _Deadline(threading.local):
    """When the request of this thread has to be over."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._at = 0.0

    def start(self) -> None:
        self._at = time.monotonic() + self._seconds

    def left(self, timeout: float | None, error: type[Exception]) -> float:
        left = self._at - time.monotonic()
        if left <= 0:
            raise error("timed out")
        return left if timeout is None else min(left, timeout)


class _Network(httpcore2.NetworkBackend):
    def __init__(self, deadline: _Deadline) -> None:
        self._deadline = deadline
        self._system = httpcore2.SyncBackend()

    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.NetworkStream:
        """Connect to the first address that answers. The time-out is one for all addresses, of which a dead network has several."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except OSError as error:
            raise httpcore2.ConnectError(str(error)) from error
        end = time.monotonic() + self._deadline.left(timeout, httpcore2.ConnectTimeout)
        failed: Exception = httpcore2.ConnectError("no address")
        for *_, address in found:
            left = end - time.monotonic()
            if left <= 0:
                raise httpcore2.ConnectTimeout("timed out")
            try:
                stream = self._system.connect_tcp(str(address[0]), port, left, local_address, socket_options)
            except httpcore2.ConnectError as error:
                failed = error
            else:
                return _Stream(stream, self._deadline)
        raise failed


class _Stream(httpcore2.NetworkStream):
    def __init__(self, stream: httpcore2.NetworkStream, deadline: _Deadline) -> None:
        self._stream = stream
        self._deadline = deadline

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._stream.read(max_bytes, self._deadline.left(timeout, httpcore2.ReadTimeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        for start in range(0, len(buffer), _PIECE):
            self._stream.write(buffer[start : start + _PIECE], self._deadline.left(timeout, httpcore2.WriteTimeout))

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore2.NetworkStream:
        left = self._deadline.left(timeout, httpcore2.ConnectTimeout)
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, left), self._deadline)

    def close(self) -> None:
        self._stream.close()

    def get_extra_info(self, info: str) -> Any:
        return self._stream.get_extra_info(info)


class _Body(httpx2.SyncByteStream):
    def __init__(self, answer: httpcore2.Response) -> None:
        self._answer = answer

    def __iter__(self) -> Iterator[bytes]:
        with _as_httpx2():
            yield from self._answer.iter_stream()

    def close(self) -> None:
        self._answer.close()


def _proxy(url: str, context: ssl.SSLContext, network: _Network) -> httpcore2.HTTPProxy:
    parts = urlsplit(url)
    host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
    return httpcore2.HTTPProxy(
        f"{parts.scheme}://{host}:{parts.port or _PORTS[parts.scheme]}",
        proxy_auth=None if parts.username is None else (unquote(parts.username).encode(), unquote(parts.password or "").encode()),
        ssl_context=context,
        proxy_ssl_context=context if parts.scheme == "https" else None,
        network_backend=network,
    )


@contextmanager
def _as_httpx2(proxy: str | None = None) -> Iterator[None]:
    """httpcore2 and httpx2 have the same errors under the same names. A note names the proxy: it may be what failed."""
    try:
        yield
    except (
        httpcore2.TimeoutException,
        httpcore2.NetworkError,
        httpcore2.ProtocolError,
        httpcore2.ProxyError,
        httpcore2.UnsupportedProtocol,
    ) as error:
        kind: type[httpx2.TransportError] = getattr(httpx2, type(error).__name__)
        raised = kind(str(error))
        if proxy is not None:
            raised.add_note(f"through the proxy {proxy}")
        raise raised from error
