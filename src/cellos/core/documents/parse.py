"""From the bytes of a document to a checked ExecutionCell."""

from __future__ import annotations

from cellos.core.documents import rules, strict
from cellos.core.documents.execution_cell import ExecutionCell
from cellos.core.documents.shape import to_struct
from cellos.errors import SpecSyntaxError


def parse_execution_cell(raw: bytes, *, allow_unknown_fields: bool = False) -> ExecutionCell:
    """One document: strict JSON, then shape, then the rules; the first fault is the error.

    `allow_unknown_fields` drops members that a document does not have, instead of refusing them. Raises SpecSyntaxError where it is not a
    well-formed document, InvalidSpec where it breaks a rule.
    """
    value = strict.decode(raw)
    try:
        document = to_struct(value, ExecutionCell, allow_unknown_fields=allow_unknown_fields)
    except SpecSyntaxError:
        # Another kind of document has another shape: that it is another kind is the better answer.
        if isinstance(value, dict):
            rules.refuse_other_kind(value.get("apiVersion"), value.get("kind"))
        raise
    rules.validate(document)
    return document
