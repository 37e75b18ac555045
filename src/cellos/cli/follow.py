"""`cellos events --follow`: every event of the control plane as it comes, each once and in order, over connections that are lost."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Never

from cellos.cli import timeline
from cellos.cli.control_plane import connected, wants_json
from cellos.cli.process import say
from cellos.core.events import parse_event
from cellos.core.formation.events import phase_of
from cellos.core.ids import rfc3339
from cellos.errors import CellosError, CursorExpired, EvidenceError

if TYPE_CHECKING:
    from cellos.client.answers import Entry
    from cellos.client.server import Server
    from cellos.core.events import Event

WIDTH_OF_NAME = 24


def follow(server: str | None, token_file: str | None, *, since: int | None, subject: str | None, as_json: bool) -> Never:
    """Print until somebody ends it. `since` None: from now on. Raises ServerError, KeyboardInterrupt, BrokenPipeError."""
    show = json_line if wants_json(as_json) else text_line
    cursor = since
    with connected(server, token_file) as found:
        while True:
            before = cursor
            try:
                for entry in found.follow(since=cursor, subject=subject, note=_say):
                    cursor = entry.seq
                    sys.stdout.write(f"{show(entry)}\n")
                    sys.stdout.flush()
            except CursorExpired as error:
                cursor = max(0, (error.oldest or 1) - 1)
                if cursor == before:
                    raise  # it would for ever
                _say(f"{error.text}{_or_above(found, before, cursor)}; going on with the oldest there is")


def _or_above(found: Server, before: int | None, cursor: int) -> str:
    """Who gave a number by hand may have given one that the log has not come to."""
    if before is None or before < cursor:
        return ""
    try:
        return f", or {before} is above the last, {found.end()}"
    except CellosError:
        return ""  # the next connection says why


def json_line(entry: Entry) -> str:
    """The event in its own bytes, on one line: between the members of a JSON text a line feed is as good as a space."""
    event = bytes(entry.event).replace(b"\n", b" ").replace(b"\r", b" ")
    return f'{{"seq":{entry.seq},"event":{event.decode()}}}'


def text_line(entry: Entry) -> str:
    """When, to whom, and what: `2026-11-21 14:03:12.120  demo-build  started  backend linux, ttl 60 s`."""
    try:
        event = parse_event(bytes(entry.event))
    except EvidenceError as error:
        return f"{'?':23}  {timeline.visible(f'event {entry.seq} cannot be read: {error.text}')}"
    label, first, *_ = described(event)
    return f"{_time(event):23}  {_about(event):{WIDTH_OF_NAME}}  {label:13}  {first}".rstrip()


def described(event: Event) -> list[str]:
    """As the timeline of a run has it; a formation in its own words."""
    phase = phase_of(event.type)
    if phase is None:
        return timeline.described(event)
    data = event.members
    count = data.get("cellCount")
    parts = [f"{count} member{'' if count == 1 else 's'}"] if phase == "created" and isinstance(count, int) else []
    failed = data.get("failedCellIds")
    if isinstance(failed, list) and failed:
        parts.append(f"failed: {', '.join(map(str, failed))}")
    if isinstance(data.get("reason"), str):
        parts.append(data["reason"])
    return [phase.upper(), timeline.visible("; ".join(parts))]


def _about(event: Event) -> str:
    """Whom an event is about: a cell, else a formation."""
    members = event.members
    names = (members.get(name) for name in ("cellId", "formationName", "name", "formationId", "specId"))
    return timeline.visible(next((name for name in names if isinstance(name, str) and name), "-"))


def _time(event: Event) -> str:
    """To the millisecond, UTC."""
    start = timeline.start_of(event)
    return "?" if start is None else rfc3339(start)[:23].replace("T", " ")


def _say(text: str) -> None:
    say(f"cellos: {text}")
