"""A proxy in front of an S3 API in which things go wrong, as it is told.

What can go wrong with a request: `500` and `503` are answers that come from nobody behind it, and so are `409` and `412`, for one that
creates; `reset` closes the connection before the request is handed on, `lost` after it was done; `hang` does it and never answers.
"""

from __future__ import annotations

import http.client
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import urlsplit

FAULTS = ("500", "503", "409", "412", "reset", "lost", "hang")
ANSWERS = {"500": "InternalError", "503": "SlowDown", "409": "ConditionalRequestConflict", "412": "PreconditionFailed"}
OF_CREATION = frozenset({"409", "412"})


class Proxy(ThreadingHTTPServer):
    """`decide(method, path)` says what goes wrong with a request, "" for nothing; `seen` counts what did."""

    daemon_threads = True

    def __init__(self, endpoint: str, decide: Callable[[str, str], str]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind = urlsplit(endpoint)
        self.decide = decide
        self.seen: Counter[str] = Counter()
        self.requests: list[tuple[str, str]] = []
        self.closing = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Proxy
    wbufsize = 1 << 16  # an answer leaves in one piece

    def _pass_on(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        fault = self.server.decide(self.command, self.path)
        if fault in OF_CREATION and not (self.command == "PUT" and self.headers.get("If-None-Match")):
            fault = "503"
        self.server.seen[fault or "well"] += 1
        self.server.requests.append((self.command, self.path))
        if fault in ANSWERS:
            self._answer(int(fault), {}, f"<Error><Code>{ANSWERS[fault]}</Code><Message>by the proxy</Message></Error>".encode())
            return
        if fault == "reset":
            self._hang_up()
            return
        connection = http.client.HTTPConnection(self.server.behind.hostname or "", self.server.behind.port, timeout=60)
        headers = {name: value for name, value in self.headers.items() if name.lower() not in {"connection", "host"}}
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        if fault == "hang":
            self.server.closing.wait(60)
        if fault in {"lost", "hang"}:
            self._hang_up()
            return
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in {"connection", "transfer-encoding"}}
        self._answer(answer.status, kept, content)

    do_GET = do_PUT = do_HEAD = do_DELETE = do_POST = _pass_on  # noqa: N815  # names of the library

    def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.send_response_only(status)
        if not any(name.lower() == "content-length" for name in headers):
            headers["Content-Length"] = str(len(body))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _hang_up(self) -> None:
        self.close_connection = True
        try:
            self.connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # name of the library
        pass


@contextmanager
def proxy(endpoint: str, decide: Callable[[str, str], str]) -> Iterator[Proxy]:
    server = Proxy(endpoint, decide)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def in_turn(every: int) -> Callable[[str, str], str]:
    """Each fault in its turn, one in so many requests; those of a creation where it is one."""
    lock = threading.Lock()
    waiting = list(FAULTS)
    number = 0

    def decide(method: str, path: str) -> str:
        nonlocal number
        with lock:
            number += 1
            if number % every:
                return ""
            is_create = method == "PUT" and ("/claimed/" in path or "/leases/" in path or "/receipts/" in path)
            fault = next(each for each in waiting if is_create or each not in OF_CREATION)
            waiting.remove(fault)
            waiting.append(fault)
            return fault

    return decide
