"""The members of a formation, and the specs that they may carry.

A member's `spec` is the body of `ExecutionCell.spec` without `id`: the id of its cell is made of the formation's and the member's. Either
all members have one, or none has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import msgspec

from cellos.core.documents import CellSpec, ExecutionCell, rules
from cellos.core.documents.execution_cell import API_VERSION, KIND
from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.core.documents.shape import to_struct
from cellos.core.documents.wording import given
from cellos.core.formation.names import MEMBER_ID_RULE, is_member_id, shown
from cellos.core.problem import problem
from cellos.errors import FormationRejected, InvalidSpec

DEFAULT_POOL = "default"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member. `spec.id` is the member's; `cell_id` makes the cell's. `pool` is where its cells may run."""

    id: str
    authorized_by: str | None = None
    spec: CellSpec | None = None
    pool: str = DEFAULT_POOL


def cell_id(formation_id: str, member_id: str) -> str:
    """The id of a member's cell: an identifier of at most 101 characters, the formation's before the first dot."""
    return f"{formation_id}.{member_id}"


def read_members(entries: Sequence[Mapping[str, Any]]) -> tuple[Member, ...]:
    """Members of a well-formed flat document. Raises FormationRejected where a spec, or what goes with it, is not right."""
    with_spec = [entry for entry in entries if entry.get("spec") is not None]
    if not with_spec:
        return tuple(Member(id=entry["id"], authorized_by=entry.get("authorizedBy")) for entry in entries)
    if len(with_spec) < len(entries):
        without = next(entry for entry in entries if entry.get("spec") is None)
        raise FormationRejected(
            problem(
                "bad-request",
                f"member {shown(with_spec[0]['id'])} has a spec and member {shown(without['id'])} has none: "
                "give all members a spec, or none of them",
            )
        )
    return tuple(_read(entry, f"members[{index}]") for index, entry in enumerate(entries))


def _read(entry: Mapping[str, Any], path: str) -> Member:
    name = entry["id"]
    if not is_member_id(name):
        _refuse(name, f"{path}.id", f"the id of a member with a spec {MEMBER_ID_RULE}")
    spec = _read_spec(entry["spec"], name, path)
    return Member(id=name, authorized_by=entry.get("authorizedBy"), spec=spec, pool=_pool(entry.get("pool"), spec, name, path))


def _read_spec(value: object, name: str, path: str) -> CellSpec:
    if not isinstance(value, dict):
        _refuse(name, f"{path}.spec", f"spec must be an object, given {given(value)}")
    if "id" in value:
        _refuse(name, f"{path}.spec.id", "the id of the cell is made of the formation's and the member's: remove it")
    cell = {"apiVersion": API_VERSION, "kind": KIND, "spec": {"id": name, **value}}
    try:
        document = to_struct(cell, ExecutionCell)
        rules.validate(document)
    except InvalidSpec as error:
        _refuse(name, f"{path}.{error.path or 'spec'}", error.text)
    return document.spec


def _pool(value: object, spec: CellSpec, name: str, path: str) -> str:
    """`pool` of the member and `poolId` of its placement are two places for one thing."""
    placed = spec.placement.pool_id if spec.placement else None
    if value is None:
        return placed or DEFAULT_POOL
    if not isinstance(value, str):
        _refuse(name, f"{path}.pool", f"pool must be a string, given {given(value)}")
    if not is_portable(value):
        _refuse(name, f"{path}.pool", f"pool {PORTABLE_RULE}")
    if placed not in (None, value):
        _refuse(name, f"{path}.pool", f"pool is {shown(value)} and spec.placement.poolId is {shown(placed)}: give one of them")
    return value


def _refuse(name: str, path: str, reason: str) -> NoReturn:
    raise FormationRejected(problem("bad-request", f"member {shown(name)} ({path}): {reason}"))
