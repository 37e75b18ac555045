"""The connection that writes go by: all messages of a write leave in one piece, and one answer comes back. nats-py takes many steps for it.

It stands beside the connection of a LogClient, is opened by the first write, and again by the first one after it was lost; while the client
itself is not connected, nothing is tried. A write is in one connection only: nothing of it is sent again on the next.
"""

from __future__ import annotations

import asyncio

from cellos.errors import LogUnreachable, OutcomeUnknown
from cellos.eventlog.connect import LogClient
from cellos.eventlog.link import Link, open_link
from cellos.eventlog.stored import Stored
from cellos.eventlog.wire import Control


class Writer:
    """Any number of tasks may write at once. It ends with its client."""

    def __init__(self, client: LogClient) -> None:
        self._client = client
        client.on_close.append(self.close)
        self._link: Link | None = None
        self._opening: asyncio.Task[Link] | None = None
        self._closed = False

    async def link(self) -> Link:
        """An open connection. Raises LogUnreachable."""
        found = self._link
        if found is not None and found.failure is None:
            return found
        if not self._client.is_connected:
            raise LogUnreachable("there is no connection to NATS")
        if self._opening is None:  # those who come meanwhile wait for the same one
            self._opening = asyncio.create_task(self._open())
            self._opening.add_done_callback(self._opened)
        return await asyncio.shield(self._opening)

    async def ask(self, link: Link, reply: bytes, data: bytes, seconds: float, *, what: str) -> Control:
        """Send a write by a connection that `link` has just given; the answer. Raises OutcomeUnknown."""
        try:
            return await link.answer(reply, data, seconds)
        except TimeoutError as error:
            link.fail("no answer in time")  # whoever writes next shall not wait as long for a peer that is gone
            raise OutcomeUnknown(f"{what}: no answer in time; whether it was written is not known") from error
        except LogUnreachable as error:
            raise OutcomeUnknown(f"{what}: {error.text}; whether it was written is not known") from error

    def close(self) -> None:
        """After what is queued was sent; also what is on its way."""
        self._closed = True
        if self._link is not None:
            self._link.close()

    async def _open(self) -> Link:
        client = self._client
        link = await open_link(client.settings, client.server, name=f"{client.name}-writer", on_items=_ignore, on_end=_nothing)
        if self._closed:
            link.close()
            raise LogUnreachable("the connection to NATS was closed")
        return link

    def _opened(self, task: asyncio.Task[Link]) -> None:
        self._opening = None
        if not task.cancelled() and task.exception() is None:
            self._link = task.result()
            if self._closed:  # in the moment between its end and this
                self._link.close()


def _ignore(items: list[Stored | Control]) -> None:
    """An answer that nobody waits for any more."""


def _nothing() -> None:
    """Whoever waits for an answer hears of the end."""
