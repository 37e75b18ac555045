"""Pages of a stream, by direct get: no consumer is made, none is left behind. The stream has `allow_direct`."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
from nats import errors as nats_errors
from nats.aio.client import Client

from cellos.errors import EventLogError, LogUnreachable
from cellos.eventlog.api import API_SECONDS, ask, without_prefix
from cellos.eventlog.stored import Stored, nanoseconds

MAX_PAGE_MESSAGES = 1_000
_ADDED = ("Nats-Stream", "Nats-Subject", "Nats-Sequence", "Nats-Time-Stamp", "Nats-Num-Pending", "Nats-Last-Sequence")
"""What a server adds to a message that it gives directly."""


async def read_page(client: Client, stream: str, query: Mapping[str, Any], *, seconds: float = API_SECONDS) -> list[Stored]:
    """The messages that a query finds: `seq` (the first that may come), `batch` (how many at most), `next_by_subj` (a filter).

    Raises NoStream, LogUnreachable.
    """
    ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    page: list[Stored] = []

    async def take(message: Any) -> None:
        found = message.headers or {}
        if ended.done():
            return
        if "Nats-Sequence" in found:
            page.append(_direct(found, message.data))
        else:
            ended.set_result(found.get("Status", ""))

    inbox = client.new_inbox()
    try:
        subscription = await client.subscribe(inbox, cb=take)
        try:
            await client.publish(f"$JS.API.DIRECT.GET.{stream}", msgspec.json.encode(query), reply=inbox)
            async with asyncio.timeout(seconds):
                status = await ended
        finally:
            await subscription.unsubscribe()
    except (nats_errors.Error, OSError, TimeoutError) as error:
        why = "no answer in time" if isinstance(error, TimeoutError) else without_prefix(error)
        raise LogUnreachable(f"read {stream}: {why}") from error
    if status == "503":
        await ask(client, f"STREAM.INFO.{stream}")  # only this tells a stream that is not there from one that is out of reach
        raise LogUnreachable(f"read {stream}: nobody answers; has the stream allow_direct, and are enough of its servers up?")
    if status not in {"204", "404"}:  # end of batch; nothing there
        raise EventLogError(f"read {stream}: status {status[:20]!r}")
    return page


def _direct(found: Mapping[str, str], data: bytes) -> Stored:
    own = "".join(f"{name}: {value}\r\n" for name, value in found.items() if name not in _ADDED)
    return Stored(
        sequence=int(found["Nats-Sequence"]),
        subject=found["Nats-Subject"],
        headers=f"NATS/1.0\r\n{own}\r\n".encode() if own else b"",
        data=data,
        time=nanoseconds(found["Nats-Time-Stamp"]),
    )
