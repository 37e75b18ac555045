"""NATS subject filters: `*` stands for one token, `>` at the end for one or more."""

from __future__ import annotations

from collections.abc import Callable

EVERYTHING = "cellos.events.>"
"""The subjects of the event log."""
_MAX_LENGTH = 1024


def is_filter(text: str) -> bool:
    """Whether NATS would take it as a filter."""
    if len(text) > _MAX_LENGTH or any(character <= " " or character == "\x7f" for character in text):
        return False
    *front, last = text.split(".")
    return all(token and token != ">" for token in front) and bool(last)


def meets(text: str) -> bool:
    """Whether a filter selects among the events: it is within their subjects, or they are all within it."""
    return is_filter(text) and (_covers(EVERYTHING, text) or _covers(text, EVERYTHING))


def matcher(text: str) -> Callable[[str], bool]:
    """The test of a subject against a filter that `meets`."""
    if _covers(text, EVERYTHING):
        return lambda subject: True
    if "*" not in text and not text.endswith(".>"):
        return lambda subject: subject == text
    pattern = text.split(".")
    return lambda subject: _matches(pattern, subject.split("."))


def _matches(pattern: list[str], tokens: list[str]) -> bool:
    if pattern[-1] == ">":
        if len(tokens) < len(pattern):
            return False
        pattern, tokens = pattern[:-1], tokens[: len(pattern) - 1]
    elif len(tokens) != len(pattern):
        return False
    return all(want in {"*", got} for want, got in zip(pattern, tokens, strict=True))


def _covers(wide: str, narrow: str) -> bool:
    """Whether every subject that `narrow` selects is selected by `wide`."""
    outer, inner = wide.split("."), narrow.split(".")
    for position, want in enumerate(outer):
        if want == ">":
            return len(inner) > position
        if position >= len(inner) or inner[position] == ">":
            return False
        if want not in {"*", inner[position]}:
            return False
    return len(outer) == len(inner)
