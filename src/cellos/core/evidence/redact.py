"""Redaction: take the values of named members out of an event before it is chained, signed, kept or sent.

The setting is CELLOS_REDACT_EVENT_FIELDS: blank is off, anything else is a list of member names, separated by commas, in which `defaults`
(any case) stands for `DEFAULTS`. Names match exactly, at any depth of `data`; values are not looked at. What was a list stays a list, what
was an object an object; everything else becomes a string, so a redacted number is no number any more.

The link to the event before (`data.chain`) is added after redaction, so it is never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cellos.errors import ConfigError

VARIABLE = "CELLOS_REDACT_EVENT_FIELDS"
DEFAULTS = frozenset({"argv", "path", "reason"})
REDACTED = "[redacted]"
KEPT = frozenset({"cellId", "specId", "runId", "specHash"})
"""Without these an event belongs to no run and its chain cannot be checked."""

OUR_WORDS = frozenset({"cancelled", "node_lost", "node_drained", "node_restarted"})
"""Values that stay whatever they are named: why a node ended a run tells nothing of the program, and controllers go by it."""


def parse_fields(setting: str | None) -> frozenset[str]:
    """The member names of a setting; None is one that is not set. Raises ConfigError for a list of none, and for a name to be kept."""
    text = (setting or "").strip()
    if not text:
        return frozenset()
    names = frozenset(name.strip() for name in text.split(",")) - {""}
    if not names:
        raise ConfigError(f"{VARIABLE}: {text[:40]!r} names no member; unset it to redact nothing")
    words = {name for name in names if name.lower() == "defaults"}
    fields = names - words | DEFAULTS if words else names
    for name in sorted(fields & KEPT):
        raise ConfigError(f"{VARIABLE}: cannot redact {name}: events could no longer be attributed to their run or verified; leave it out")
    return fields


def redact(data: Mapping[str, Any], fields: frozenset[str]) -> dict[str, Any]:
    """`data` with the values of all members named in `fields` replaced. The argument is not changed."""
    if not fields:
        return dict(data)
    return {name: _blank(value) if name in fields else _inside(value, fields) for name, value in data.items()}


def _inside(value: Any, fields: frozenset[str]) -> Any:
    if isinstance(value, Mapping):
        return redact(value, fields)
    if isinstance(value, list | tuple):
        return [_inside(each, fields) for each in value]
    return value


def _blank(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {}
    if isinstance(value, str) and value in OUR_WORDS:
        return value
    return [REDACTED] if isinstance(value, list | tuple) else REDACTED
