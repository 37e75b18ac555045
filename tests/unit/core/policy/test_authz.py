import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.core.policy.authz import (
    AuthorizationPolicy,
    Denial,
    authorize,
    policy_faults,
    rate_denial,
    read_authorization_policy,
)
from cellos.errors import InvalidSpec

GOLDEN = Path(__file__).parents[3] / "golden" / "policy" / "authorization"


def policy(**spec: Any) -> AuthorizationPolicy:
    whole = {"apiVersion": "cellos.io/v1", "kind": "AuthorizationPolicy", "spec": {"subjects": ["acme", "emea"]} | spec}
    return read_authorization_policy(json.dumps(whole).encode())


def cell(tenant: str | None = "acme", pool: str | None = None, pack: str | None = None) -> CellSpec:
    spec: dict[str, Any] = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 60}, "correlation": {"tenantId": tenant}}
    if pool is not None:
        spec["placement"] = {"poolId": pool}
    if pack is not None:
        spec["policy"] = {"packId": pack}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": spec}).encode()).spec


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_a_faulty_policy_gets_its_text(path: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_authorization_policy(path.read_bytes())
    assert caught.value.text == path.with_suffix(".error").read_text().removesuffix("\n")


def test_the_first_fault_is_told_in_the_order_of_the_checks() -> None:
    bad: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Policy",
        "spec": {"subjects": [" "], "allowedPools": [""], "allowedPolicyPacks": [""], "maxCellsPerHour": 0},
    }
    assert [fault.path for fault in policy_faults(msgspec.convert(bad, AuthorizationPolicy))] == [
        "apiVersion",
        "kind",
        "spec.subjects[0]",
        "spec.allowedPools[0]",
        "spec.allowedPolicyPacks[0]",
        "spec.maxCellsPerHour",
    ]


def test_a_policy_may_be_yaml() -> None:
    text = "apiVersion: cellos.io/v1\nkind: AuthorizationPolicy\nspec:\n  subjects: [acme, emea]\n  maxCellsPerHour: 5\n"
    assert read_authorization_policy(text.encode(), syntax="yaml") == policy(maxCellsPerHour=5)


@pytest.mark.parametrize(
    ("spec", "cell"),
    [
        ({}, cell()),
        ({}, cell("emea", "anywhere", "any")),
        ({"allowedPools": ["a", "b"]}, cell(pool="b")),
        ({"allowedPolicyPacks": ["p"]}, cell(pack="p")),
        ({"allowedPools": ["a"], "allowedPolicyPacks": ["p"], "maxCellsPerHour": 1}, cell(pool="a", pack="p")),
    ],
)
def test_what_the_policy_lists_is_authorized(spec: dict[str, Any], cell: CellSpec) -> None:
    assert authorize(policy(**spec), cell) is None


@pytest.mark.parametrize(
    ("spec", "cell", "denial"),
    [
        (
            {},
            cell(None),
            Denial(
                reason="subject_not_authorized",
                message="spec.correlation.tenantId is required when an AuthorizationPolicy is configured but the spec did not declare one",
            ),
        ),
        (
            {},
            cell("Acme"),
            Denial(reason="subject_not_authorized", message='tenantId "Acme" is not in the authorization policy subjects list'),
        ),
        (
            {"allowedPools": ["a"]},
            cell(),
            Denial(
                reason="pool_not_allowed",
                message="spec.placement.poolId is required when the authorization policy declares allowedPools",
            ),
        ),
        (
            {"allowedPools": ["a*"]},
            cell(pool="ab"),
            Denial(reason="pool_not_allowed", message='pool "ab" is not in the authorization policy allowedPools list', pool_id="ab"),
        ),
        (
            {"allowedPolicyPacks": ["p"]},
            cell(),
            Denial(
                reason="policy_pack_not_allowed",
                message="spec.policy.packId is required when the authorization policy declares allowedPolicyPacks",
            ),
        ),
        (
            {"allowedPolicyPacks": ["p"]},
            cell(pack="q"),
            Denial(
                reason="policy_pack_not_allowed",
                message='policy pack "q" is not in the authorization policy allowedPolicyPacks list',
                pack_id="q",
            ),
        ),
    ],
)
def test_what_it_does_not_list_is_denied_with_its_reason(spec: dict[str, Any], cell: CellSpec, denial: Denial) -> None:
    assert authorize(policy(**spec), cell) == denial


def test_subject_then_pool_then_pack() -> None:
    strict = policy(allowedPools=["a"], allowedPolicyPacks=["p"])
    reasons = [
        denial.reason if (denial := authorize(strict, spec)) else None
        for spec in (cell("x", "x", "x"), cell("acme", "x", "x"), cell("acme", "a", "x"), cell("acme", "a", "p"))
    ]
    assert reasons == ["subject_not_authorized", "pool_not_allowed", "policy_pack_not_allowed", None]


def test_a_spec_without_correlation_has_no_subject() -> None:
    spec = msgspec.structs.replace(cell(), correlation=None)
    denial = authorize(policy(), spec)
    assert denial is not None
    assert denial.reason == "subject_not_authorized"


def test_a_used_up_hour_is_told_with_its_number() -> None:
    denial = rate_denial(policy(maxCellsPerHour=3), "acme")
    assert denial.reason == "rate_limit_exceeded"
    assert denial.message == (
        'tenantId "acme" has started 3 cell(s) on this host within the last hour, the most that the authorization policy allows'
        " (maxCellsPerHour)"
    )
