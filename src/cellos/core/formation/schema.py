"""The JSON Schema of formation documents in both shapes, so that editors and other languages check what we check.

A member's spec is that of an ExecutionCell, generated from its structs. What relates members to each other (one coordinator, a tree, no
cycle, narrowing) is beyond a schema.
"""

from __future__ import annotations

from typing import Any, get_args

import msgspec

from cellos.core.documents import CellSpec
from cellos.core.documents.identifiers import PORTABLE
from cellos.core.documents.schema import DIALECT, readable
from cellos.core.formation.documents import API_VERSION, ENVELOPE, FLAT, KIND
from cellos.core.formation.names import MEMBER_ID_PATTERN, NAME_PATTERN
from cellos.core.formation.options import (
    MOST_BACKOFF_MS,
    MOST_DEADLINE_SECONDS,
    MOST_FACTOR,
    MOST_LOST_NODES,
    MOST_RETRIES,
    OnDisconnect,
    OnNodeLost,
)

Schema = dict[str, Any]

_TEXT: Schema = {"type": "string"}
_OBJECT: Schema = {"type": "object"}
_NAME: Schema = {"type": "string", "pattern": f"^{NAME_PATTERN}$"}
_MEMBER_ID: Schema = {"type": "string", "pattern": f"^{MEMBER_ID_PATTERN}$"}
_KEPT_METADATA: Schema = {"labels": _OBJECT, "annotations": _OBJECT}
_SPEC_OF_MEMBERS: Schema = {"$ref": "#/$defs/MemberSpec"}


def formation_schema() -> Schema:
    """A document is flat or in kubectl style; either all members have a spec, or none has."""
    _, definitions = msgspec.json.schema_components([CellSpec], ref_template="#/$defs/{name}")
    # The struct's default stands for "absent"; a document cannot write it.
    del definitions["Mount"]["properties"]["target"]["default"]
    definitions["MemberSpec"] = _without_id(definitions.pop("CellSpec"))
    return {
        "$schema": DIALECT,
        "title": "Formation",
        "anyOf": [{"$ref": "#/$defs/FlatFormation"}, {"$ref": "#/$defs/KubectlFormation"}],
        "$defs": {"FlatFormation": _flat(), "KubectlFormation": _kubectl(), **_members("id"), **_members("name"), **readable(definitions)},
    }


def _without_id(spec: Schema) -> Schema:
    properties = {name: value for name, value in spec["properties"].items() if name != "id"}
    return {
        **spec,
        "title": "MemberSpec",
        "description": "The body of ExecutionCell.spec without `id`: the cell's is made of the formation's id and the member's.",
        "properties": properties,
        "required": [name for name in spec["required"] if name != "id"],
    }


def _flat() -> Schema:
    return {
        "title": "FlatFormation",
        "description": "The form that is kept and shown. Members that are not named here are carried along.",
        "type": "object",
        "properties": {
            "name": _NAME,
            "coordinator": _TEXT,
            "members": _list_of("id"),
            "metadata": {
                "description": "What is kept of the metadata of a document in kubectl style.",
                "type": "object",
                "properties": _KEPT_METADATA,
                "minProperties": 1,
                "additionalProperties": False,
            },
            **{name: False for name in ENVELOPE if name != "metadata"},
        },
        "required": list(FLAT),
        **_settings("id"),
    }


def _kubectl() -> Schema:
    return {
        "title": "KubectlFormation",
        "type": "object",
        "properties": {
            "apiVersion": {"const": API_VERSION},
            "kind": {"const": KIND},
            "metadata": {
                "type": "object",
                "properties": {"name": _NAME, **_KEPT_METADATA},
                "required": ["name"],
                "additionalProperties": False,
            },
            "spec": {
                "description": "Members that are not named here become members of the flat form.",
                "type": "object",
                "properties": {"coordinator": _TEXT, "members": _list_of("name"), "name": False, **dict.fromkeys(ENVELOPE, False)},
                "required": ["coordinator", "members"],
                **_settings("name"),
            },
        },
        "required": list(ENVELOPE),
        "additionalProperties": False,
    }


def _list_of(key: str) -> Schema:
    """All members with a spec, or none."""
    return {
        "type": "array",
        "minItems": 1,
        "anyOf": [{"items": {"$ref": f"#/$defs/{title}"}} for title in _members(key)],
    }


def _settings(key: str) -> Schema:
    """What a document says beside its members, which means something only where they have specs."""
    return {
        "if": {"properties": {"members": {"items": {"$ref": f"#/$defs/{_style(key)}Member"}}}},
        "else": {
            "properties": {
                "templates": {
                    "description": "Specs by name, for members to use.",
                    "type": ["object", "null"],
                    "propertyNames": {"pattern": f"^{PORTABLE}$"},
                    "additionalProperties": _SPEC_OF_MEMBERS,
                },
                "deadlineSeconds": _number("A formation that has not ended so long after it was admitted fails.", 1, MOST_DEADLINE_SECONDS),
                "onDisconnect": {
                    "description": "What a node does with the cells when it is cut off from NATS for longer than its lease.",
                    "enum": [*get_args(OnDisconnect), None],
                },
            }
        },
    }


def _number(description: str, least: int, most: int, kind: str = "integer") -> Schema:
    return {"description": description, "type": [kind, "null"], "minimum": least, "maximum": most}


def _options() -> dict[str, Schema]:
    """What a member with a spec says beside it; null is the default of each."""
    return {
        "pool": {"type": ["string", "null"], "pattern": f"^{PORTABLE}$"},
        "after": {
            "description": "The members that must have succeeded before this one begins.",
            "type": ["array", "null"],
            "items": _TEXT,
            "uniqueItems": True,
        },
        "critical": {"description": "Whether the formation fails with this member; true where absent.", "type": ["boolean", "null"]},
        "retries": _number("How often it is tried again when its program fails.", 0, MOST_RETRIES),
        "onNodeLost": {
            "description": f"Whether it is tried again, at most {MOST_LOST_NODES} times, when its node is lost; fail where absent.",
            "enum": [*get_args(OnNodeLost), None],
        },
        "backoff": {
            "description": "How long it waits before it is tried again.",
            "type": ["object", "null"],
            "properties": {
                "initialMs": _number("Before the second attempt; 1000 where absent.", 0, MOST_BACKOFF_MS),
                "maxMs": _number("At most; 60000 where absent.", 0, MOST_BACKOFF_MS),
                "factor": _number("How much longer each time; 2 where absent.", 1, MOST_FACTOR, "number"),
            },
            "additionalProperties": False,
        },
    }


def _style(key: str) -> str:
    return "Flat" if key == "id" else "Kubectl"


def _members(key: str) -> dict[str, Schema]:
    """A member with a spec and one without. `key` is what its id is called: `id`, or `name` in kubectl style."""
    other: Schema = {"id": False} if key == "name" else {}
    authorized_by = {"type": ["string", "null"], "description": "The id of the member above; absent for the coordinator alone."}
    style = _style(key)
    return {
        f"{style}MemberWithSpec": {
            "type": "object",
            "properties": {
                key: _MEMBER_ID,
                "authorizedBy": authorized_by,
                "spec": {"anyOf": [_SPEC_OF_MEMBERS, {"type": "null"}]},
                "use": {"description": "The name of a template, in place of a spec.", "type": ["string", "null"]},
                **_options(),
                **other,
            },
            "required": [key],
            "oneOf": [{"required": [each], "properties": {each: {"not": {"type": "null"}}}} for each in ("spec", "use")],
        },
        f"{style}Member": {
            "type": "object",
            "properties": {key: _TEXT, "authorizedBy": authorized_by, "spec": {"type": "null"}, "use": {"type": "null"}, **other},
            "required": [key],
        },
    }
