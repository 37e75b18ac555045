"""From the bytes of a document to a checked ExecutionCell."""

from __future__ import annotations

from typing import Literal

from cellos.core.documents import rules, strict
from cellos.core.documents.execution_cell import ExecutionCell
from cellos.core.documents.shape import to_struct
from cellos.errors import SpecSyntaxError

Syntax = Literal["json", "yaml"]


def parse_execution_cell(raw: bytes, *, allow_unknown_fields: bool = False, syntax: Syntax = "json") -> ExecutionCell:
    """One document: strict JSON or YAML, then shape, then the rules; the first fault is the error.

    `allow_unknown_fields` drops members that a document does not have, instead of refusing them. Raises SpecSyntaxError where it is not a
    well-formed document, InvalidSpec where it breaks a rule.
    """
    value = decode(raw, syntax)
    try:
        document = to_struct(value, ExecutionCell, allow_unknown_fields=allow_unknown_fields)
    except SpecSyntaxError:
        # Another kind of document has another shape: that it is another kind is the better answer.
        if isinstance(value, dict):
            rules.refuse_other_kind(value.get("apiVersion"), value.get("kind"))
        raise
    rules.validate(document)
    return document


def decode(raw: bytes, syntax: Syntax) -> object:
    """The value of one document in a syntax. Raises SpecSyntaxError."""
    if syntax == "json":
        return strict.decode(raw)
    from cellos.core.documents import yaml

    return yaml.decode(raw)


def syntax_of(name: str, raw: bytes) -> Syntax:
    """The syntax of a document that was read from the file `name`: what the name ends in, else (`-` is standard input) what it begins with.

    A JSON document is an object, so it begins with `{`; a YAML document may, but then it has to be named `.yaml`.
    """
    lowered = name.lower()
    if lowered.endswith((".yaml", ".yml")):
        return "yaml"
    if lowered.endswith(".json") or raw.lstrip(b" \t\r\n").startswith(b"{"):
        return "json"
    return "yaml"
