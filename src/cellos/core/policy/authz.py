"""The AuthorizationPolicy document: which tenants may run cells here, in which pools, under which packs, and how many in an hour.

The subject of a cell is its `spec.correlation.tenantId`. Names match exactly; an empty list of pools or packs restricts nothing. Texts are
compatible with CellOS 0.5.
"""

# No `from __future__ import annotations`: msgspec would have to evaluate each of the strings again.

from collections.abc import Callable
from typing import Annotated, Literal

from msgspec import Meta, Struct

from cellos.core.documents.execution_cell import API_VERSION, CellSpec, Wire
from cellos.core.documents.identifiers import WHITE_SPACE
from cellos.core.documents.parse import Syntax, decode
from cellos.core.documents.rules import Fault, Faults
from cellos.core.documents.shape import to_struct
from cellos.core.documents.wording import quoted
from cellos.errors import InvalidSpec, SpecSyntaxError

KIND = "AuthorizationPolicy"

NotBlank = Annotated[str, Meta(extra_json_schema={"pattern": r"\S"})]
Reason = Literal["subject_not_authorized", "pool_not_allowed", "policy_pack_not_allowed", "rate_limit_exceeded"]


class AuthorizationSpec(Wire, frozen=True, kw_only=True):
    subjects: Annotated[tuple[NotBlank, ...], Meta(extra_json_schema={"minItems": 1})]
    allowed_pools: tuple[NotBlank, ...] = ()
    allowed_policy_packs: tuple[NotBlank, ...] = ()
    max_cells_per_hour: Annotated[int, Meta(ge=0, le=2**32 - 1, extra_json_schema={"exclusiveMinimum": 0})] | None = None


class AuthorizationPolicy(Wire, frozen=True, kw_only=True):
    """The whole document: `cellos.io/v1`, `AuthorizationPolicy`."""

    api_version: Annotated[str, Meta(extra_json_schema={"const": API_VERSION})]
    kind: Annotated[str, Meta(extra_json_schema={"const": KIND})]
    spec: AuthorizationSpec


class Denial(Struct, frozen=True, kw_only=True):
    """Why a cell is not authorized. `pool_id` and `pack_id` name what was refused, where that is the reason."""

    reason: Reason
    message: str
    pool_id: str | None = None
    pack_id: str | None = None


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def read_authorization_policy(raw: bytes, *, syntax: Syntax = "json") -> AuthorizationPolicy:
    """One policy: strict JSON or YAML, then shape, then the checks in their order; the first fault is the error.

    Raises SpecSyntaxError where it is not a well-formed document, InvalidSpec where it breaks a check.
    """
    value = decode(raw, syntax)
    try:
        policy = to_struct(value, AuthorizationPolicy)
    except SpecSyntaxError:
        # Another kind of document has another shape: that it is another kind is the better answer.
        if isinstance(value, dict):
            for fault in _head_faults(value.get("apiVersion"), value.get("kind")):
                raise InvalidSpec(fault.text, path=fault.path) from None
        raise
    for fault in policy_faults(policy):
        raise InvalidSpec(fault.text, path=fault.path)
    return policy


def policy_faults(policy: AuthorizationPolicy) -> Faults:
    """Everything that is wrong with a well-shaped policy, in the order of the checks."""
    for check in CHECKS:
        yield from check(policy)


def _head_faults(api_version: object, kind: object) -> Faults:
    if isinstance(api_version, str) and api_version != API_VERSION:
        yield Fault(f"authorization policy apiVersion must be {quoted(API_VERSION)}, got {quoted(api_version)}", "apiVersion")
    if isinstance(kind, str) and kind != KIND:
        yield Fault(f"authorization policy kind must be {quoted(KIND)}, got {quoted(kind)}", "kind")


def _head(policy: AuthorizationPolicy) -> Faults:
    yield from _head_faults(policy.api_version, policy.kind)


def _subjects(policy: AuthorizationPolicy) -> Faults:
    if not policy.spec.subjects:
        yield Fault(
            "authorization policy spec.subjects must be non-empty — an empty subjects list would reject every spec;"
            " remove CELLOS_AUTHZ_POLICY_PATH to disable the gate instead",
            "spec.subjects",
        )


def _entries(policy: AuthorizationPolicy) -> Faults:
    for name, entries, blank in (
        ("subjects", policy.spec.subjects, "an empty / whitespace-only entry"),
        ("allowedPools", policy.spec.allowed_pools, "an empty entry"),
        ("allowedPolicyPacks", policy.spec.allowed_policy_packs, "an empty entry"),
    ):
        for index, entry in enumerate(entries):
            if not entry.strip(WHITE_SPACE):
                yield Fault(f"authorization policy spec.{name} contains {blank}", f"spec.{name}[{index}]")


def _rate(policy: AuthorizationPolicy) -> Faults:
    if policy.spec.max_cells_per_hour == 0:
        yield Fault("authorization policy spec.maxCellsPerHour must be > 0 when set", "spec.maxCellsPerHour")


CHECKS: tuple[Callable[[AuthorizationPolicy], Faults], ...] = (_head, _subjects, _entries, _rate)


# --- judging ----------------------------------------------------------------------------------------------------------------------------


def authorize(policy: AuthorizationPolicy, spec: CellSpec) -> Denial | None:
    """The first gate that does not let the cell pass: subject, pool, pack. The hourly limit needs a count: see `rate_denial`."""
    return next((denial for gate in GATES if (denial := gate(policy.spec, spec))), None)


def rate_denial(policy: AuthorizationPolicy, subject: str) -> Denial:
    """What to say where the subject has had its `maxCellsPerHour`."""
    most = policy.spec.max_cells_per_hour
    return Denial(
        reason="rate_limit_exceeded",
        message=f"tenantId {quoted(subject)} has started {most} cell(s) on this host within the last hour,"
        " the most that the authorization policy allows (maxCellsPerHour)",
    )


def _subject_gate(policy: AuthorizationSpec, spec: CellSpec) -> Denial | None:
    tenant = spec.correlation.tenant_id if spec.correlation else None
    if tenant is None:
        message = "spec.correlation.tenantId is required when an AuthorizationPolicy is configured but the spec did not declare one"
    elif tenant not in policy.subjects:
        message = f"tenantId {quoted(tenant)} is not in the authorization policy subjects list"
    else:
        return None
    return Denial(reason="subject_not_authorized", message=message)


def _pool_gate(policy: AuthorizationSpec, spec: CellSpec) -> Denial | None:
    pool = spec.placement.pool_id if spec.placement else None
    if not policy.allowed_pools or pool in policy.allowed_pools:
        return None
    if pool is None:
        message = "spec.placement.poolId is required when the authorization policy declares allowedPools"
    else:
        message = f"pool {quoted(pool)} is not in the authorization policy allowedPools list"
    return Denial(reason="pool_not_allowed", message=message, pool_id=pool)


def _pack_gate(policy: AuthorizationSpec, spec: CellSpec) -> Denial | None:
    pack = spec.policy.pack_id if spec.policy else None
    if not policy.allowed_policy_packs or pack in policy.allowed_policy_packs:
        return None
    if pack is None:
        message = "spec.policy.packId is required when the authorization policy declares allowedPolicyPacks"
    else:
        message = f"policy pack {quoted(pack)} is not in the authorization policy allowedPolicyPacks list"
    return Denial(reason="policy_pack_not_allowed", message=message, pack_id=pack)


GATES: tuple[Callable[[AuthorizationSpec, CellSpec], Denial | None], ...] = (_subject_gate, _pool_gate, _pack_gate)
