"""The members of a formation, and the specs that they may carry.

A member's `spec` is the body of `ExecutionCell.spec` without `id`: the id of its cell is made of the formation's and the member's. In its
place a member may `use` one of the document's `templates`, which are such bodies with a name. Either all members have a spec, or none has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple, NoReturn

import msgspec

from cellos.core.documents import CellSpec, ExecutionCell, rules
from cellos.core.documents.execution_cell import API_VERSION, KIND
from cellos.core.documents.identifiers import PORTABLE_RULE, is_portable
from cellos.core.documents.shape import to_struct
from cellos.core.documents.wording import given, member
from cellos.core.formation import options
from cellos.core.formation.names import MEMBER_ID_RULE, is_member_id, shown
from cellos.core.formation.options import Backoff, OnNodeLost
from cellos.core.problem import problem
from cellos.errors import FormationRejected, InvalidSpec

DEFAULT_POOL = "default"


class Member(msgspec.Struct, frozen=True, kw_only=True):
    """One member. `spec.id` is the member's; `cell_id` makes the cell's. `pool` is where its cells may run.

    `body` is the spec as it was written, which a template's members share; nobody changes it. The rest is in docs/reference/formation.md.
    """

    id: str
    authorized_by: str | None = None
    spec: CellSpec | None = None
    body: Mapping[str, Any] | None = None
    pool: str = DEFAULT_POOL
    after: tuple[str, ...] = ()
    critical: bool = True
    retries: int = 0
    on_node_lost: OnNodeLost = "fail"
    backoff: Backoff = Backoff()

    @property
    def most_attempts(self) -> int:
        return 1 + self.retries + (options.MOST_LOST_NODES if self.on_node_lost == "retry" else 0)


class Body(NamedTuple):
    """A spec, and what was written."""

    spec: CellSpec
    written: Mapping[str, Any]


def cell_id(formation_id: str, member_id: str) -> str:
    """The id of a member's cell: an identifier of at most 101 characters, the formation's before the first dot."""
    return f"{formation_id}.{member_id}"


def has_spec(entry: Mapping[str, Any]) -> bool:
    """Whether a member says what to run."""
    return entry.get("spec") is not None or entry.get("use") is not None


def read_members(entries: Sequence[Mapping[str, Any]], templates: object = None) -> tuple[Member, ...]:
    """Members of a well-formed flat document. Raises FormationRejected where a spec, or what goes with it, is not right."""
    with_spec = [entry for entry in entries if has_spec(entry)]
    if not with_spec:
        return tuple(Member(id=entry["id"], authorized_by=entry.get("authorizedBy")) for entry in entries)
    if len(with_spec) < len(entries):
        without = next(entry for entry in entries if not has_spec(entry))
        raise FormationRejected(
            problem(
                "bad-request",
                f"member {shown(with_spec[0]['id'])} has a spec and member {shown(without['id'])} has none: "
                "give all members a spec, or none of them",
            )
        )
    bodies = _read_templates(templates)
    return tuple(_read(entry, bodies, f"members[{index}]") for index, entry in enumerate(entries))


def _read(entry: Mapping[str, Any], templates: Mapping[str, Body], path: str) -> Member:
    name = entry["id"]
    if not is_member_id(name):
        _refuse(name, f"{path}.id", f"the id of a member with a spec {MEMBER_ID_RULE}")
    try:
        options.refuse_misspelt(entry, options.MEMBER_OPTIONS)
        spec, written = _read_body(entry, name, templates, path)
        return Member(
            id=name,
            authorized_by=entry.get("authorizedBy"),
            spec=spec,
            body=written,
            pool=_pool(entry.get("pool"), spec, name, path),
            after=options.read_after(entry),
            critical=options.read_critical(entry),
            retries=options.read_retries(entry),
            on_node_lost=options.read_on_node_lost(entry),
            backoff=options.read_backoff(entry),
        )
    except InvalidSpec as error:
        _refuse(name, _below(path, error.path), error.text)


def _read_body(entry: Mapping[str, Any], name: str, templates: Mapping[str, Body], path: str) -> Body:
    use, value = entry.get("use"), entry.get("spec")
    if use is None:
        return Body(_read_spec(value, name), entry["spec"])
    if value is not None:
        _refuse(name, f"{path}.use", "a member has a spec, or uses a template: remove one of them")
    if not isinstance(use, str):
        _refuse(name, f"{path}.use", f"use must be the name of a template, given {given(use)}")
    body = templates.get(use)
    if body is None:
        _refuse(name, f"{path}.use", f"use names {shown(use)}, which is not in templates{_nearest(use, templates)}")
    return Body(msgspec.structs.replace(body.spec, id=name), body.written)


def _read_templates(value: object) -> dict[str, Body]:
    """Each is checked as the spec of a member is, also one that nobody uses."""
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise FormationRejected(problem("bad-request", f"templates must be an object of specs by name, given {given(value)}"))
    return {name: Body(_read_template(written, name), written) for name, written in value.items()}


def _read_template(value: object, name: str) -> CellSpec:
    path = member("templates", name)
    try:
        if not is_portable(name):
            raise InvalidSpec(f"the name of a template {PORTABLE_RULE}")
        return _read_spec(value, name)
    except InvalidSpec as error:
        place = _below(path, error.path.removeprefix("spec").removeprefix("."))
        raise FormationRejected(problem("bad-request", f"template {shown(name)} ({place}): {error.text}")) from None


def _read_spec(value: object, name: str) -> CellSpec:
    """Raises InvalidSpec, with a path that begins at `spec`."""
    if not isinstance(value, dict):
        raise InvalidSpec(f"spec must be an object, given {given(value)}", path="spec")
    if "id" in value:
        raise InvalidSpec("the id of the cell is made of the formation's and the member's: remove it", path="spec.id")
    cell = {"apiVersion": API_VERSION, "kind": KIND, "spec": {"id": name, **value}}
    document = to_struct(cell, ExecutionCell)
    try:
        rules.validate(document)
    except InvalidSpec as error:
        raise InvalidSpec(error.text, path=error.path or "spec") from None
    return document.spec


def _below(path: str, rest: str) -> str:
    return path + ("" if rest.startswith("[") or not rest else ".") + rest


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


def _nearest(name: str, known: Iterable[str]) -> str:
    """A hint for the end of a refusal."""
    close = get_close_matches(name[:64], list(known), n=1)
    return f"; did you mean {shown(close[0])}?" if close else ""
