"""The variables of a daemon as rows of a table, from which its reference page is made."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple


class Variable(NamedTuple):
    """A row of the page: `bad` says what a value that cannot be used does."""

    name: str
    default: str
    effect: str
    bad: str = "an error"


def table(variables: Iterable[Variable]) -> str:
    """The table of a page."""
    rows = ["| variable | default | effect | a value that cannot be used |", "|---|---|---|---|"]
    rows += [f"| `{each.name}` | {each.default} | {each.effect} | {each.bad} |" for each in variables]
    return "\n".join(rows) + "\n"
