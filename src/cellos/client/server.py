"""The control plane, for programs: what `cellos get`, `apply`, `wait`, `logs`, `delete` and `events --follow` are made of.

    with Server(find_server(os.environ)) as server:
        made = server.apply(document)
        ended = server.wait(made.id)
        for entry in server.follow(since=server.events(limit=1).cursor):
            ...

Synchronous; one object per thread. Records are the server's own JSON objects. What the server refuses is a ServerProblem with its type,
title and detail; where nobody answers it is ServerUnreachable.

A request that can be repeated without doing anything twice is repeated, a few times with growing pauses, where nobody answered or the
answer was that the server cannot do it now: every GET, a DELETE by id, and a POST with its idempotency key, which all of ours have. Any
other is repeated only where it cannot have been received.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import urlencode, urljoin, urlsplit

import msgspec

from cellos.client.address import Address
from cellos.client.answers import Entry, Expired, Kind, Record, after_close, formation_path, is_id, problem_of, quoted, read_frame, records
from cellos.core.formation.transitions import TERMINAL
from cellos.core.formation.views import FormationView
from cellos.core.ids import UUID_RANDOM_BYTES, uuid7
from cellos.core.output import NDJSON, OutputEnd, Piece, read_line
from cellos.errors import ServerError, ServerProblem, ServerUnreachable
from cellos.http import client, fault_text, trust
from cellos.http.proxies import goes_direct, proxies

if TYPE_CHECKING:
    import httpx2

_T = TypeVar("_T")

TIMEOUT_MS = 30_000
CONNECT_TIMEOUT_MS = 5_000
PAUSES = (0.1, 0.3, 0.9)
"""Seconds before a request is repeated."""
LONGEST_RETRY_AFTER = 5.0
_NOT_NOW = frozenset({429, 502, 503, 504})
_END = (1 << 63) - 1
"""A cursor behind everything."""

# The server pings every 25 s; a peer that does not answer ours within as long is dead.
_PING_SECONDS = 25.0
_CLOSE_SECONDS = 1.0
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.2, 10.0
_SHORTEST_LOOK, _LONGEST_LOOK, _LOOK_PART = 0.1, 2.0, 3.0
"""Seconds between two looks at a formation: three times what the last one took, within these."""
_FOREVER_MS = 1 << 40
SILENCE_SECONDS = 60.0
"""A server that follows output says something every few seconds."""
_STEADY_SECONDS = 30.0
"""A connection that held so long is followed by the shortest pause."""
_LARGEST_FRAME = 1 << 26
"""NATS has no larger messages."""


class EventPage(msgspec.Struct, frozen=True, kw_only=True):
    """Events in order. To have what follows: `since=page.cursor`."""

    events: list[Entry]
    cursor: int


class Made(msgspec.Struct, frozen=True, kw_only=True):
    """What `apply` made; `status` is PENDING, or what it was when the same request was made before."""

    id: str
    name: str
    status: str


class Server:
    """A control plane; use with `with`, or close it. `sleep` waits so many seconds."""

    def __init__(
        self,
        address: Address,
        *,
        environment: Mapping[str, str] = os.environ,
        timeout_ms: int = TIMEOUT_MS,
        pauses: Sequence[float] = PAUSES,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.address = address
        # A proxy has no business with this host's own traffic.
        self._environment = {**environment, "no_proxy": "*"} if address.is_here else dict(environment)
        self._pauses = tuple(pauses)
        self._sleep = sleep
        self._headers = {} if address.token is None else {"Authorization": f"Bearer {address.token}"}
        self._http = client(self._environment, timeout_ms=timeout_ms, connect_timeout_ms=min(timeout_ms, CONNECT_TIMEOUT_MS))

    def __enter__(self) -> Server:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._http.close()

    # ---------------------------------------------------------------- requests

    def version(self) -> Record:
        """`{"server": {"version", …}, "api": {"version"}}`."""
        return self._object(self._get("/v1/version"))

    def cells(self, *, state: str | None = None, formation: str | None = None, limit: int | None = None) -> list[Record]:
        """Cells in the order of their ids; `state` is pending, running or destroyed, `formation` an id."""
        return self._list("cells", {"state": state, "formation": formation, "limit": limit}, limit)

    def cell(self, cell_id: str) -> Record:
        return self._object(self._get(f"/v1/cells/{quoted(cell_id)}"))

    def formations(self, *, limit: int | None = None) -> list[Record]:
        """Formations in the order of their ids."""
        return self._list("formations", {"limit": limit}, limit)

    def formation(self, ident: str) -> Record:
        """A formation by its id or its name."""
        return self._object(self._get(formation_path(ident)))

    def members(self, ident: str) -> FormationView:
        """A formation, by its id or its name, with its members: what each does, or waits for."""
        return self._decoded(self._get(f"/v1/formations/{quoted(ident)}/members"), FormationView)

    def nodes(self) -> Record:
        """`{"nodes": […], "controllers": […]}`: what runs cells, and what drives formations."""
        return self._object(self._get("/v1/nodes"))

    def apply(self, document: bytes, *, key: str | None = None) -> Made:
        """Make the formation of a JSON document. The same `key` again gives the first answer, and makes nothing; None is a new one.

        ServerUnreachable, and a ServerProblem with status 503: it is not known whether it was made; repeat it with the same key.
        """
        headers = {"Idempotency-Key": key or new_key(), "Content-Type": "application/json"}
        answer = self._request("POST", "/v1/formations", body=document, headers=headers, repeat=True)
        return self._decoded(answer, Made)

    def delete(self, ident: str) -> None:
        """End a formation, by its id or its name."""
        # A name may stand for another formation when the request is repeated.
        self._request("DELETE", formation_path(ident), repeat=is_id(ident))

    def events(self, *, since: int = 0, limit: int | None = None, subject: str | None = None) -> EventPage:
        """A page of the events behind a cursor. `subject`: a NATS filter."""
        return self._decoded(self._get("/v1/events", {"since": since, "limit": limit, "subject": subject}), EventPage)

    def end(self) -> int:
        """The cursor behind all events that there are now."""
        return self.events(since=_END, limit=1).cursor

    def follow(
        self, *, since: int | None = None, subject: str | None = None, note: Callable[[str], None] = lambda _: None
    ) -> Iterator[Entry]:
        """Every event behind a cursor and every one to come, each once and in order; without `since`, those that are yet to come.

        A connection that is lost is made again for as long as it takes, from the last event on; `note` is told. The first one is tried as
        often as any request. Raises ServerUnreachable, ServerProblem, and CursorExpired: events that should have come are gone.
        """
        cursor = self.end() if since is None else since
        first = iter(self._pauses)
        pause, lost, was_open, came, why = 0.0, False, False, False, ""
        while True:
            opened = time.monotonic()
            try:
                for entry in self._frames(cursor, subject, subject_is_right=subject is None or came):
                    was_open = True
                    if lost:
                        note(f"connected to {self.address.url} again")
                        lost = False
                    if entry is not None and entry.seq > cursor:
                        cursor, pause, came = entry.seq, 0.0, True
                        yield entry
            except (ServerUnreachable, ServerProblem) as error:
                if isinstance(error, ServerProblem) and error.status not in _NOT_NOW:
                    raise
                if not was_open:
                    wait = next(first, None)
                    if wait is None:
                        raise
                    self._sleep(wait)
                    continue
                why = error.text
            if not lost:
                lost = True
                note(f"{why}; trying again")
            if time.monotonic() - opened > _STEADY_SECONDS:
                pause = 0.0
            pause = min(_LONGEST_PAUSE, max(_SHORTEST_PAUSE, 2 * pause))
            self._sleep(pause * random.uniform(0.5, 1.0))

    # ---------------------------------------------------------------- over time

    def watch(self, ident: str, *, note: Callable[[str], None] = lambda _: None) -> Iterator[FormationView]:
        """A formation's members again and again, for ever. The first answer has to come; in a later outage they are given as they were.

        `note` is told of outages. Where the name comes to be another formation's, this one is still meant.
        """
        lost, view = False, None
        while True:
            asked = time.monotonic()
            try:
                view = self.members(ident)
            except (ServerUnreachable, ServerProblem) as error:
                if view is None or (isinstance(error, ServerProblem) and error.status not in _NOT_NOW):
                    raise
                if not lost:
                    note(f"{error.text}; trying again")
                lost, pause = True, _LONGEST_LOOK
            else:
                if lost:
                    note(f"connected to {self.address.url} again")
                # To be asked must not cost the server more than a small part of its time.
                pause = min(_LONGEST_LOOK, max(_SHORTEST_LOOK, _LOOK_PART * (time.monotonic() - asked)))
                lost, ident = False, view.formation_id
            yield view
            self._sleep(pause)

    def wait(self, ident: str, *, until: Collection[str] = TERMINAL, timeout: float | None = None) -> FormationView:
        """Until a formation has one of these status words, has ended, or `timeout` seconds are over: how it stands then."""
        end = None if timeout is None else time.monotonic() + timeout
        for view in self.watch(ident):
            if view.status in until or view.has_ended or (end is not None and time.monotonic() >= end):
                return view
        raise AssertionError  # it goes on for ever

    def output(
        self,
        cell_id: str,
        *,
        run: str | None = None,
        stream: str | None = None,
        follow: bool = False,
        note: Callable[[str], None] = lambda _: None,
    ) -> Iterator[Piece | OutputEnd]:
        """What a cell wrote, in order, and an OutputEnd. `run`: of that run, else of the latest one; `stream`: stdout or stderr.

        `follow`: and what it is yet to write, until it has ended; a connection that is lost is made again where it ended.
        """
        after, lost, came = 0, 0, False
        while True:
            query = {"run": run, "stream": stream, "follow": "1" if follow else None, "after": after or None, "format": "ndjson"}
            try:
                for each in self._lines(f"/v1/cells/{quoted(cell_id)}/output", query):
                    run, came, lost = each.run_id, True, 0
                    if isinstance(each, Piece):
                        after = each.sequence
                    yield each
                    if isinstance(each, OutputEnd):
                        return
                why = "the connection ended"
            except (ServerUnreachable, ServerProblem) as error:
                if isinstance(error, ServerProblem) and error.status not in _NOT_NOW:
                    raise
                why = error.text
            if lost >= len(self._pauses) and not (follow and came):
                raise ServerUnreachable(why)
            if lost == 0 and came:
                note(f"{why}; trying again")
            lost += 1
            self._sleep(min(_LONGEST_PAUSE, _SHORTEST_PAUSE * 2**lost))

    def _lines(self, path: str, query: Mapping[str, object]) -> Iterator[Piece | OutputEnd]:
        """Raises ServerUnreachable, ServerProblem."""
        import httpx2

        given = {name: value for name, value in query.items() if value is not None}
        # A run may be silent for long; the server sends a blank line now and then.
        patience = httpx2.Timeout(SILENCE_SECONDS, connect=CONNECT_TIMEOUT_MS / 1000)
        limit_ms = _FOREVER_MS if query["follow"] else TIMEOUT_MS
        try:
            with (
                client(self._environment, timeout_ms=limit_ms, connect_timeout_ms=CONNECT_TIMEOUT_MS) as http,
                http.stream("GET", f"{self.address.url}{path}?{urlencode(given)}", headers=self._headers, timeout=patience) as answer,
            ):
                if not answer.is_success:
                    answer.read()
                    raise ServerProblem(problem_of(answer.status_code, answer.headers.get("Content-Type", ""), answer.content))
                if not answer.headers.get("Content-Type", "").startswith(NDJSON):
                    raise ServerError(f"{path}: the answer is no {NDJSON}")
                for line in answer.iter_lines():
                    if line:
                        yield read_line(line.encode())
        except httpx2.TransportError as error:
            raise self._unreachable(error) from error

    # ---------------------------------------------------------------- below

    def _get(self, path: str, query: Mapping[str, object] | None = None) -> httpx2.Response:
        given = {name: value for name, value in (query or {}).items() if value is not None}
        return self._request("GET", f"{path}?{urlencode(given, errors='surrogateescape')}" if given else path, repeat=True)

    def _request(
        self, method: str, path: str, *, repeat: bool, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> httpx2.Response:
        """The answer, a success. Raises ServerUnreachable, ServerProblem."""
        import httpx2

        sent = False
        for pause in (*self._pauses, None):
            try:
                answer = self._http.request(method, self.address.url + path, content=body, headers={**self._headers, **(headers or {})})
            except httpx2.TransportError as error:
                arrived = not isinstance(error, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.ProxyError)
                sent = sent or arrived
                if pause is None or (arrived and not repeat):
                    raise self._unreachable(error, sent=sent) from error
                self._sleep(pause)
                continue
            if answer.is_success:
                return answer
            if pause is None or not repeat or answer.status_code not in _NOT_NOW:
                raise ServerProblem(problem_of(answer.status_code, answer.headers.get("Content-Type", ""), answer.content))
            sent = True
            self._sleep(max(pause, _retry_after(answer.headers.get("Retry-After", ""))))
        raise AssertionError  # the last round returns or raises

    def _list(self, kind: Kind, query: Mapping[str, object], limit: int | None) -> list[Record]:
        """All pages of a list, or as many as `limit` asks for."""
        answer = self._get(f"/v1/{kind}", query)
        found = records(answer.content, kind)
        while (limit is None or len(found) < limit) and "next" in answer.links:
            base = f"{self.address.url}/v1/{kind}"
            following = urljoin(base, answer.links["next"]["url"])
            if not following.startswith(f"{base}?"):  # the token goes nowhere else
                raise ServerError(f"the next page of {base} lies elsewhere: {following}")
            answer = self._request("GET", following.removeprefix(self.address.url), repeat=True)
            found += records(answer.content, kind)
        return found[:limit]

    def _object(self, answer: httpx2.Response) -> Record:
        return self._decoded(answer, Record)

    def _decoded(self, answer: httpx2.Response, kind: type[_T]) -> _T:
        try:
            return msgspec.json.decode(answer.content, type=kind)
        except msgspec.DecodeError as error:
            raise ServerError(f"{answer.request.method} {answer.request.url.path}: cannot read the answer: {error}") from error

    def _unreachable(self, error: Exception, *, sent: bool = True) -> ServerUnreachable:
        return ServerUnreachable(f"no answer from {self.address.url}: {fault_text(error)}", sent=sent)

    def _frames(self, cursor: int, subject: str | None, *, subject_is_right: bool) -> Iterator[Entry | None]:
        """None when the connection is open, then what it brings. It ends with an error: ServerUnreachable where it was lost."""
        from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
        from websockets.sync.client import connect

        query = {"since": cursor} if subject is None else {"since": cursor, "subject": subject}
        url = f"ws{self.address.url.removeprefix('http')}/ws/events?{urlencode(query, errors='surrogateescape')}"
        parts = urlsplit(self.address.url)
        secure = parts.scheme == "https"
        direct = goes_direct(self._environment, parts.hostname or "", parts.port or (443 if secure else 80))
        expired: Expired | None = None
        try:
            with connect(
                url,
                ssl=trust(self._environment) if secure else None,
                proxy=None if direct else proxies(self._environment).get(parts.scheme),
                additional_headers=self._headers,
                user_agent_header="cellos",
                compression=None,
                ping_interval=_PING_SECONDS,
                ping_timeout=_PING_SECONDS,
                close_timeout=_CLOSE_SECONDS,
                max_size=_LARGEST_FRAME,
            ) as socket:
                yield None
                try:
                    while True:
                        frame = read_frame(socket.recv(decode=False))
                        if isinstance(frame, Entry):
                            cursor = frame.seq
                            yield frame
                        else:
                            expired = frame
                finally:
                    socket.close()
        except InvalidStatus as error:
            answer = error.response
            problem = problem_of(answer.status_code, answer.headers.get("Content-Type", ""), bytes(answer.body or b""))
            raise ServerProblem(problem) from error
        except ConnectionClosed as error:
            code, reason = (None, "") if error.rcvd is None else (error.rcvd.code, error.rcvd.reason)
            raise after_close(code, reason, cursor=cursor, expired=expired, subject_is_right=subject_is_right) from error
        except (OSError, InvalidHandshake, EOFError) as error:
            raise self._unreachable(error) from error


def new_key() -> str:
    """An idempotency key that nobody else has."""
    return uuid7(time.time_ns() // 1_000_000, os.urandom(UUID_RANDOM_BYTES))


def _retry_after(text: str) -> float:
    """Seconds that a server asks for, within what we are willing to wait; 0 where it asks for none, or for a date."""
    return min(float(text), LONGEST_RETRY_AFTER) if text.isascii() and text.isdigit() else 0.0
