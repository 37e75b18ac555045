"""Streams beside the log: made where they are missing, and looked at before they are used."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from msgspec import Struct
from nats.aio.client import Client

from cellos.errors import EventLogError, NoStream
from cellos.eventlog.api import NO_STREAM, ask

NANO = 1_000_000_000
_NAME_IN_USE = 10058


class _Info(Struct):
    config: dict[str, Any]


_INFO = msgspec.json.Decoder(_Info)


async def ensure_side_stream(client: Client, config: Mapping[str, Any], *, needed: Sequence[str]) -> None:
    """Make the stream of this config unless it is there. One that is there must have the `needed` settings; the others are its owner's.

    Raises NoStream with every difference, other EventLogErrors.
    """
    name = config["name"]
    try:
        answer = await ask(client, f"STREAM.INFO.{name}")
    except NoStream as error:
        if error.number != NO_STREAM:
            raise
        try:
            answer = await ask(client, f"STREAM.CREATE.{name}", config)
        except EventLogError as refused:
            if refused.number != _NAME_IN_USE:  # somebody else made it in this moment, in another way
                raise
            answer = await ask(client, f"STREAM.INFO.{name}")
    found = _INFO.decode(answer).config
    wrong = [f"{key} is {_word(found.get(key))}, not {_word(config[key])}" for key in needed if not _same(found.get(key), config[key])]
    if wrong:
        raise NoStream(f"the stream {name} cannot be used: {'; '.join(wrong)}. Change it (`nats stream edit {name}`) or remove it")


def _same(found: Any, wanted: Any) -> bool:
    """A server adds members of its own to a source."""
    if isinstance(wanted, list) and isinstance(found, list):
        return len(found) == len(wanted) and all(_same(one, other) for one, other in zip(found, wanted, strict=True))
    if isinstance(wanted, dict) and isinstance(found, dict):
        return all(_same(found.get(key), value) for key, value in wanted.items())
    return bool(found == wanted)


def _word(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value is not None else "unset"
