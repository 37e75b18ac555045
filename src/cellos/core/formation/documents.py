"""Formation documents: two shapes that people write, one that is kept.

Flat: `name`, `coordinator`, `members[]` with `id`, `authorizedBy` and whatever else. Kubectl style: `apiVersion`, `kind`, `metadata.name`,
`spec.coordinator`, `spec.members[]` with `name` in place of `id`. Kept, and shown again, is the flat one: what it holds beside the members
that are known here is carried along unread. A kept document, sent again, is the same formation.

Everything is refused in one order, the first fault is the answer: syntax, shape, types, name, structure, specs, order, narrowing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from cellos.core.documents import Limits
from cellos.core.documents.parse import Syntax, decode
from cellos.core.documents.strict import OutOfRange
from cellos.core.documents.wording import given, member, quoted
from cellos.core.formation.members import Member, has_spec, read_members
from cellos.core.formation.names import refuse_name, shown
from cellos.core.formation.narrowing import PLATFORM_LIMITS, refuse_widening
from cellos.core.formation.options import (
    FORMATION_OPTIONS,
    MOST_DEADLINE_SECONDS,
    OnDisconnect,
    read_deadline_seconds,
    read_on_disconnect,
    refuse_misspelt,
)
from cellos.core.formation.structure import Link, refuse_order, refuse_structure
from cellos.core.problem import problem
from cellos.errors import FormationRejected, SpecSyntaxError

API_VERSION = "cellos.dev/v1"
KIND = "Formation"
FLAT = ("name", "coordinator", "members")
ENVELOPE = ("apiVersion", "kind", "metadata", "spec")
KEPT_METADATA = ("labels", "annotations")
_METADATA = ("name", *KEPT_METADATA)
_SPEC = ("coordinator", "members")

Object = dict[str, Any]


class Formation(msgspec.Struct, frozen=True, kw_only=True):
    """A formation that is admitted. `document` is its flat form, JSON values only; nobody changes it."""

    name: str
    coordinator: str
    members: tuple[Member, ...]
    document: Object
    deadline_seconds: int = MOST_DEADLINE_SECONDS
    """From `created` on: a formation that has not ended by then is failed."""
    on_disconnect: OnDisconnect = "kill"
    """What a node does with the formation's cells when it cannot renew its lease."""

    @property
    def has_specs(self) -> bool:
        """Whether its members say what to run, so that CellOS runs them; without, others do and report its status."""
        return any(member.spec is not None for member in self.members)


def parse_formation(raw: bytes, *, syntax: Syntax = "json", defaults: Limits = PLATFORM_LIMITS) -> Formation:
    """One document of either shape. `defaults` are the limits that stand for undeclared ones. Raises FormationRejected."""
    try:
        value = decode(raw, syntax)
        _refuse_unwritable(value)
        if not isinstance(value, dict):
            raise SpecSyntaxError(f"the document must be an object, given {given(value)}")
        document = _normalised(value)
        name, coordinator, entries = _typed(document)
    except SpecSyntaxError as error:
        raise _bad_request(f"invalid {syntax}: {error.text}") from None
    refuse_name(name)
    formation = _admitted(document, name, coordinator, entries)
    refuse_widening(formation.members, defaults=defaults)
    return formation


def read_formation(document: Object) -> Formation:
    """The formation of a kept document. Narrowing is not asked again: it was judged once, by the limits of then.

    Raises FormationRejected for a document that nobody could run.
    """
    try:
        return _admitted(document, *_typed(document))
    except SpecSyntaxError as error:
        raise _bad_request(error.text) from None


def _admitted(document: Object, name: str, coordinator: str, entries: list[Object]) -> Formation:
    refuse_structure(coordinator, [Link(entry["id"], entry.get("authorizedBy")) for entry in entries])
    members = read_members(entries, document.get("templates"))
    if not any(map(has_spec, entries)):
        # What is beside members that others run is carried along unread.
        return Formation(name=name, coordinator=coordinator, members=members, document=document)
    refuse_order({member.id: member.after for member in members})
    try:
        refuse_misspelt(document, (*FLAT, "metadata", *FORMATION_OPTIONS))
        deadline_seconds, on_disconnect = read_deadline_seconds(document), read_on_disconnect(document)
    except SpecSyntaxError as error:
        raise _bad_request(error.text) from None
    return Formation(
        name=name,
        coordinator=coordinator,
        members=members,
        document=document,
        deadline_seconds=deadline_seconds,
        on_disconnect=on_disconnect,
    )


def document_has_specs(document: object) -> bool:
    """`Formation.has_specs` of a kept document, or of anything else."""
    members = document.get("members") if isinstance(document, dict) else None
    return isinstance(members, list) and any(isinstance(entry, dict) and has_spec(entry) for entry in members)


def _bad_request(detail: str) -> FormationRejected:
    return FormationRejected(problem("bad-request", detail))


def _listed(names: Sequence[str]) -> str:
    return f"[{', '.join(map(quoted, names))}]"


# --- syntax -----------------------------------------------------------------------------------------------------------------------------


def _refuse_unwritable(value: object) -> None:
    """Raises SpecSyntaxError for a number that could not be written again as it was read."""
    if (found := _unwritable(value)) is None:
        return
    fault, keys = found
    path = ""
    for key in keys:
        path = f"{path}[{key}]" if isinstance(key, int) else member(path, key)
    raise SpecSyntaxError(f"{path or 'the document'} is {fault}", path=path)


def _unwritable(value: object) -> tuple[str, tuple[str | int, ...]] | None:
    """What is wrong with the first such number, and the keys that lead to it. Documents nest at most 128 levels deep."""
    if isinstance(value, (dict, list)):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            # Most values are text: looking at it here saves a call for each.
            if not isinstance(inner, str) and (found := _unwritable(inner)) is not None:
                return found[0], (key, *found[1])
    elif isinstance(value, OutOfRange):
        return f"{value}, which no 64 bits hold", ()
    elif isinstance(value, float) and abs(value) == float("inf"):
        return "a number that is too large", ()
    return None


# --- shape ------------------------------------------------------------------------------------------------------------------------------


def _normalised(value: Object) -> Object:
    """The flat form of an object in one of the two shapes. Raises FormationRejected where it is in both, or wrong in the second."""
    flat = [name for name in FLAT if name in value]
    envelope = [name for name in ENVELOPE if name in value]
    if not envelope or (flat and envelope == ["metadata"] and _is_kept_metadata(value["metadata"])):
        return value
    if flat:
        raise _bad_request(
            f"hybrid formation document: top-level flat field(s) {_listed(flat)} conflict with kubectl-style envelope field(s) "
            f"{_listed(envelope)}; pick exactly one shape (see contracts/schemas/formation-v1.schema.json)"
        )
    for fault in _envelope_faults(value):
        raise _bad_request(f"kubectl-style formation: {fault}")
    return _flattened(value["metadata"], value["spec"])


def _is_kept_metadata(value: object) -> bool:
    """Whether it is what `_flattened` leaves of `metadata`: without this, a document that was read could not be sent again."""
    return isinstance(value, dict) and bool(value) and all(name in KEPT_METADATA and isinstance(value[name], dict) for name in value)


def _flattened(metadata: Object, spec: Object) -> Object:
    members = [{"id": entry["name"], **{name: entry[name] for name in entry if name != "name"}} for entry in spec["members"]]
    kept = {name: metadata[name] for name in KEPT_METADATA if name in metadata}
    return {
        "name": metadata["name"],
        **spec,
        "members": members,
        **({"metadata": kept} if kept else {}),
    }


def _envelope_faults(value: Object) -> Iterator[str]:
    """What is wrong with a document in kubectl style, in the order in which it is told. Each check relies on those before it."""
    if unknown := sorted(value.keys() - set(ENVELOPE)):
        yield f"unknown top-level field(s) {_listed(unknown)}; allowed: {_listed(ENVELOPE)}"
    for name, expected in (("apiVersion", API_VERSION), ("kind", KIND)):
        if not isinstance(found := value.get(name), str):
            yield f"missing or non-string '{name}' (expected \"{expected}\")"
        elif found != expected:
            yield f'unsupported {name} {shown(found)} (expected "{expected}")'
    metadata, spec = value.get("metadata"), value.get("spec")
    if not isinstance(metadata, dict):
        yield "missing 'metadata' object"
        return
    if not isinstance(metadata.get("name"), str):
        yield "missing 'metadata.name'"
    if not isinstance(spec, dict):
        yield "missing 'spec' object"
        return
    if not isinstance(spec.get("coordinator"), str):
        yield "missing 'spec.coordinator'"
    yield from _kubectl_member_faults(spec.get("members"))
    for name in KEPT_METADATA:
        if name in metadata and not isinstance(metadata[name], dict):
            yield f"'metadata.{name}' must be an object"
    # The flat form has no place for these: whoever wrote them should know, not wonder later where they went.
    if unknown := sorted(metadata.keys() - set(_METADATA)):
        yield f"unknown metadata field(s) {_listed(unknown)}; allowed: {_listed(_METADATA)}"
    if misplaced := [name for name in ("name", *ENVELOPE) if name in spec]:
        yield f"field(s) {_listed(misplaced)} have no place in 'spec'; a formation's name is 'metadata.name'"


def _kubectl_member_faults(entries: object) -> Iterator[str]:
    if not isinstance(entries, list):
        yield "missing or non-array 'spec.members'"
        return
    for index, entry in enumerate(entries):
        path = f"spec.members[{index}]"
        if not isinstance(entry, dict):
            yield f"{path} is not an object"
            return
        if not isinstance(entry.get("name"), str):
            yield f"{path} missing 'name'"
        if "id" in entry:
            yield (f"{path} declares both 'name' and 'id'; kubectl manifests address members by 'name' only — remove the 'id' field")


# --- types ------------------------------------------------------------------------------------------------------------------------------


def _typed(document: Object) -> tuple[str, str, list[Object]]:
    """Name, coordinator and members of a flat document. Raises SpecSyntaxError where one is missing or of another type."""
    name, coordinator = (_string(document, field, "") for field in ("name", "coordinator"))
    members = _required(document, "members", "")
    if not isinstance(members, list):
        raise SpecSyntaxError(f"members must be a list, given {given(members)}")
    for index, entry in enumerate(members):
        path = f"members[{index}]"
        if not isinstance(entry, dict):
            raise SpecSyntaxError(f"{path} must be an object, given {given(entry)}")
        _string(entry, "id", path)
        if entry.get("authorizedBy") is not None:
            _string(entry, "authorizedBy", path)
    return name, coordinator, members


def _required(container: Object, field: str, path: str) -> object:
    if field not in container:
        raise SpecSyntaxError(f"missing field `{field}`" + (f" in {path}" if path else ""))
    return container[field]


def _string(container: Object, field: str, path: str) -> str:
    value = _required(container, field, path)
    if not isinstance(value, str):
        raise SpecSyntaxError(f"{member(path, field)} must be a string, given {given(value)}")
    return value
