"""The JSON Schema of documents, generated from the structs, so that editors and other languages check what we check."""

from __future__ import annotations

from typing import Any

import msgspec

from cellos.core.documents.execution_cell import ExecutionCell

DIALECT = "https://json-schema.org/draft/2020-12/schema"


def execution_cell_schema() -> dict[str, Any]:
    """The shape of an ExecutionCell with the patterns of its identifiers. Rules that relate members to each other are beyond a schema."""
    schema = msgspec.json.schema(ExecutionCell)
    # The struct's default stands for "absent"; a document cannot write it.
    del schema["$defs"]["Mount"]["properties"]["target"]["default"]
    return {"$schema": DIALECT, "title": "ExecutionCell", **readable(schema)}


def readable(schema: dict[str, Any]) -> dict[str, Any]:
    """The schema with descriptions whose later lines are not indented, as docstrings are before Python 3.13."""
    tidy: dict[str, Any] = {}
    for name, value in schema.items():
        if isinstance(value, dict):
            tidy[name] = readable(value)
        else:
            tidy[name] = value.replace("\n    ", "\n") if name == "description" else value
    return tidy
