"""A sink that keeps what it is given, and fails when told to."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from cellos.errors import EventSinkError


class RecordingSink:
    """EventSink in memory. `refuse` is asked before each event, with its type; true means that the sink fails and keeps nothing."""

    def __init__(self, refuse: Callable[[str], bool] = lambda _: False) -> None:
        self.refuse = refuse
        self.lines: list[bytes] = []
        self.ids: list[str] = []
        self.closed = 0

    def emit(self, event_id: str, line: bytes) -> None:
        """Keep the line."""
        event_type = json.loads(line)["type"]
        if self.refuse(event_type):
            raise EventSinkError(f"told to refuse {event_type}")
        self.ids.append(event_id)
        self.lines.append(line)

    def close(self) -> None:
        """Counted, so that a test can see that it was called."""
        self.closed += 1

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events, decoded."""
        return [json.loads(line) for line in self.lines]

    @property
    def types(self) -> list[str]:
        """The event types without the prefix that all cell events share."""
        return [str(event["type"]).removeprefix("dev.cellos.events.cell.") for event in self.events]

    def data(self, event_type: str) -> dict[str, Any]:
        """The data of the one event whose type ends in `event_type`."""
        [found] = [event["data"] for event in self.events if event["type"].endswith(event_type)]
        return dict(found)
