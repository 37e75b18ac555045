"""The stream CELLOS_EVENTS: made as it must be, and never changed.

An existing stream is used as it is where it keeps what the event log promises; where it does not, it is refused with every difference
named. Differences that merely keep less or more are reported.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct
from nats.aio.client import Client

from cellos.daemon.variables import Variable
from cellos.errors import ConfigError, EventLogError, NoStream
from cellos.eventlog.api import NO_STREAM, STREAM, ask

SUBJECTS = ("cellos.events.>",)
MAX_AGE_SECONDS = 90 * 24 * 3600
DUPLICATE_WINDOW_SECONDS = 120
DEFAULT_MAX_BYTES = 8 << 30
MINIMUM_MAX_BYTES = 1 << 20
_NANO = 1_000_000_000
_NAME_IN_USE = 10058
_REPORTED = ("num_replicas", "max_age", "max_bytes", "discard", "duplicate_window")
_REPORTED_DEFAULTS = {"max_msgs": -1, "max_msg_size": -1, "allow_rollup_hdrs": False}

VARIABLES = (
    Variable("CELLOS_NATS_STREAM_REPLICAS", "1", "replicas of the streams that are made: 1, 3 or 5"),
    Variable(
        "CELLOS_NATS_STREAM_MAX_BYTES",
        str(DEFAULT_MAX_BYTES),
        f"bytes that a stream {STREAM} that is made may hold; a full one refuses writes",
    ),
)


class StreamSettings(Struct, frozen=True, kw_only=True):
    """What an operator chooses of a stream that is made."""

    replicas: int = 1
    max_bytes: int = DEFAULT_MAX_BYTES


class StreamInfo(Struct, frozen=True, kw_only=True):
    """The state of the stream. `created` tells one stream from the next of the same name."""

    created: str
    first_seq: int
    """The oldest sequence that is there, or would be: of an empty stream the next one."""
    last_seq: int
    messages: int
    bytes: int
    differences: tuple[str, ...] = ()
    """From what `ensure_stream` would make, in words."""


def read_stream_settings(environment: Mapping[str, str]) -> StreamSettings:
    """Raises ConfigError."""
    replicas = _number(environment, "CELLOS_NATS_STREAM_REPLICAS", 1)
    max_bytes = _number(environment, "CELLOS_NATS_STREAM_MAX_BYTES", DEFAULT_MAX_BYTES)
    if replicas not in {1, 3, 5}:
        raise ConfigError(f"CELLOS_NATS_STREAM_REPLICAS: {replicas} is none of 1, 3, 5")
    if max_bytes < MINIMUM_MAX_BYTES:
        raise ConfigError(f"CELLOS_NATS_STREAM_MAX_BYTES: {max_bytes} is less than {MINIMUM_MAX_BYTES}")
    return StreamSettings(replicas=replicas, max_bytes=max_bytes)


def stream_config(*, replicas: int = 1, max_bytes: int = DEFAULT_MAX_BYTES) -> dict[str, Any]:
    """As STREAM.CREATE takes it (nats-py's class lacks `allow_atomic`)."""
    return {
        "name": STREAM,
        "subjects": list(SUBJECTS),
        "retention": "limits",
        "storage": "file",
        "num_replicas": replicas,
        "max_age": MAX_AGE_SECONDS * _NANO,
        "max_bytes": max_bytes,
        "discard": "new",  # a full log says so; it never forgets silently
        "duplicate_window": DUPLICATE_WINDOW_SECONDS * _NANO,
        "allow_atomic": True,
        "allow_direct": True,  # pages of events without a consumer that stays behind
    }


async def ensure_stream(client: Client, *, replicas: int = 1, max_bytes: int = DEFAULT_MAX_BYTES) -> StreamInfo:
    """Make the stream unless it is there. Raises NoStream where the one that is there cannot be used; other EventLogErrors."""
    wanted = stream_config(replicas=replicas, max_bytes=max_bytes)
    try:
        found = await ask(client, f"STREAM.INFO.{STREAM}")
    except NoStream as error:
        if error.number != NO_STREAM:
            raise
        found = await _create(client, wanted)
    return _checked(found, wanted)


async def _create(client: Client, wanted: dict[str, Any]) -> bytes:
    try:
        return await ask(client, f"STREAM.CREATE.{STREAM}", wanted)
    except EventLogError as error:
        if error.number != _NAME_IN_USE:  # somebody else made it in this moment, in another way
            raise
        return await ask(client, f"STREAM.INFO.{STREAM}")


async def stream_info(client: Client) -> StreamInfo:
    """The state of the stream. Raises NoStream, LogUnreachable."""
    return read_info(await ask(client, f"STREAM.INFO.{STREAM}"))


def read_info(payload: bytes) -> StreamInfo:
    """Of an answer to STREAM.INFO or STREAM.CREATE."""
    found = _INFO.decode(payload)
    state = found.state
    return StreamInfo(
        created=found.created,
        first_seq=state.first_seq if state.messages else state.last_seq + 1,
        last_seq=state.last_seq,
        messages=state.messages,
        bytes=state.bytes,
    )


class _State(Struct):
    messages: int = 0
    bytes: int = 0
    first_seq: int = 0
    last_seq: int = 0


class _Info(Struct):
    created: str
    config: dict[str, Any]
    state: _State


_INFO = msgspec.json.Decoder(_Info)


def _checked(payload: bytes, wanted: Mapping[str, Any]) -> StreamInfo:
    config = _INFO.decode(payload).config
    unusable, other = differences(config, wanted)
    if unusable:
        raise NoStream(f"the stream {STREAM} cannot be used: {'; '.join(unusable)}. Change it (`nats stream edit {STREAM}`) or remove it")
    return msgspec.structs.replace(read_info(payload), differences=other)


def differences(config: Mapping[str, Any], wanted: Mapping[str, Any]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What makes a stream unusable, and what else is not as we would have made it."""
    rules: tuple[tuple[str, Any, bool], ...] = (
        ("subjects", list(SUBJECTS), any(_covers(subject, SUBJECTS[0]) for subject in config.get("subjects") or ())),
        ("retention", "limits", config.get("retention") == "limits"),
        ("storage", "file", config.get("storage") == "file"),
        ("allow_atomic", True, config.get("allow_atomic") is True),
        ("allow_direct", True, config.get("allow_direct") is True),
        ("no_ack", False, not config.get("no_ack")),
        ("sealed", False, not config.get("sealed")),
        ("max_msgs_per_subject", -1, config.get("max_msgs_per_subject", -1) <= 0),
        ("mirror", None, not config.get("mirror")),
        ("subject_transform", None, not config.get("subject_transform")),
    )
    unusable = tuple(_difference(name, config, needed) for name, needed, is_kept in rules if not is_kept)
    expected = {name: wanted[name] for name in _REPORTED} | _REPORTED_DEFAULTS
    other = tuple(_difference(name, config, value) for name, value in expected.items() if config.get(name, value) != value)
    return unusable, other


def _difference(name: str, config: Mapping[str, Any], needed: Any) -> str:
    return f"{name} is {_word(config.get(name))}, not {_word(needed)}"


def _word(value: Any) -> str:
    return msgspec.json.encode(value).decode() if value is not None else "unset"


def _covers(subject: str, wanted: str) -> bool:
    """Whether every subject that matches `wanted` (which ends in >) matches `subject`."""
    if subject in {wanted, ">"}:
        return True
    prefix = subject.removesuffix(".>")
    return prefix != subject and "*" not in prefix and wanted.startswith(f"{prefix}.")


def _number(environment: Mapping[str, str], name: str, default: int) -> int:
    text = environment.get(name, "").strip()
    if not text:
        return default
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise ConfigError(f"{name}: {text[:40]!r} is no whole number")
    return int(text)
