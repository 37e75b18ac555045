"""One row per rule and text, then those that come close."""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents import CellSpec, parse_execution_cell
from cellos.core.policy.pack import (
    RULES,
    PolicyPack,
    PolicyRules,
    Violation,
    applies,
    bounded,
    caller_refusal,
    pack_faults,
    read_policy_pack,
    violations,
)
from cellos.errors import InvalidSpec, SpecSyntaxError

GOLDEN = Path(__file__).parents[3] / "golden" / "policy" / "pack"
EXAMPLES = Path(__file__).parents[4] / "examples" / "policies"

COVERT = (
    "spec declares port 53 (DNS) egress without acknowledgment — DNS can be used as a covert exfiltration channel;"
    " set protocol: dns-acknowledged to acknowledge this risk"
)
UNJUSTIFIED = "port-53 egress rule with protocol dns-acknowledged requires a non-empty dnsEgressJustification field"
UNLIMITED = "policy requires spec.run.limits to be declared"
NOT_ENV = "policy requires spec.run.secretDelivery to be runtimeBroker or runtimeLeasedBroker, not env"


def document(rules: dict[str, Any] | None = None, **spec: Any) -> dict[str, Any]:
    return {"apiVersion": "cellos.io/v1", "kind": "PolicyPack", "spec": {"id": "p", "rules": rules or {}} | spec}


def pack(rules: dict[str, Any] | None = None, **spec: Any) -> PolicyPack:
    return read_policy_pack(json.dumps(document(rules, **spec)).encode())


def cell(**spec: Any) -> CellSpec:
    whole = {"id": "a", "authority": {}, "lifetime": {"ttlSeconds": 60}} | spec
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": whole}).encode()).spec


def run(**members: Any) -> dict[str, Any]:
    return {"run": {"argv": ["/bin/true"]} | members}


def egress(*rules: tuple[Any, ...]) -> dict[str, Any]:
    """Rules as (host, port, protocol, justification), the last two optional."""
    names = ("host", "port", "protocol", "dnsEgressJustification")
    return {"authority": {"egressRules": [dict(zip(names, rule, strict=False)) for rule in rules]}}


# --- reading ------------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.json")), ids=lambda path: path.stem)
def test_a_faulty_pack_gets_its_text(path: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        read_policy_pack(path.read_bytes())
    assert caught.value.text == path.with_suffix(".error").read_text().removesuffix("\n")


def test_a_pack_is_read_with_all_its_rules() -> None:
    rules = pack({"maxRunTimeoutMs": 5, "allowedEgressHosts": ["*"], "secretRefAllowlist": {"ci": ["A"]}, "requireEgressDeclared": True})
    assert rules.spec.rules == PolicyRules(
        max_run_timeout_ms=5, allowed_egress_hosts=("*",), secret_ref_allowlist={"ci": ("A",)}, require_egress_declared=True
    )


def test_absent_members_may_be_null() -> None:
    nothing = dict.fromkeys(
        (
            "maxLifetimeTtlSeconds",
            "maxMemoryMaxBytes",
            "maxRunTimeoutMs",
            "flagDnsEgressWithoutAcknowledgment",
            "requireDnsEgressJustification",
            "secretRefAllowlist",
        )
    )
    assert pack(nothing, version=None, description=None, placement=None) == pack()


def test_a_pack_may_be_yaml() -> None:
    text = "apiVersion: cellos.io/v1\nkind: PolicyPack\nspec:\n  id: p\n  rules:\n    allowedEgressHosts: ['*.example', no]\n"
    assert read_policy_pack(text.encode(), syntax="yaml") == pack({"allowedEgressHosts": ["*.example", "no"]})
    with pytest.raises(SpecSyntaxError, match="line 1 column 1"):
        read_policy_pack(text.encode())


def test_the_first_fault_is_told_in_the_order_of_the_checks() -> None:
    bad: dict[str, Any] = {
        "apiVersion": "v1",
        "kind": "Pack",
        "spec": {
            "id": "",
            "version": "0",
            "placement": {"poolId": "", "queueName": "", "kubernetesNamespace": ""},
            "rules": {
                "maxLifetimeTtlSeconds": 0,
                "maxMemoryMaxBytes": 0,
                "maxRunTimeoutMs": 0,
                "requireEgressDeclared": True,
                "forbidOutboundEgressRules": True,
                "allowedEgressHosts": [""],
            },
        },
    }
    assert [fault.path for fault in pack_faults(msgspec.convert(bad, PolicyPack))] == [
        "apiVersion",
        "kind",
        "spec.id",
        "spec.version",
        "spec.rules.maxLifetimeTtlSeconds",
        "spec.rules.maxMemoryMaxBytes",
        "spec.rules.maxRunTimeoutMs",
        "spec.rules.requireEgressDeclared",
        "spec.rules.allowedEgressHosts[0]",
        "spec.placement.poolId",
        "spec.placement.queueName",
        "spec.placement.kubernetesNamespace",
    ]


def test_an_old_pack_on_request_is_checked_like_any_other() -> None:
    old = document({}, version="0.1.0")
    assert read_policy_pack(json.dumps(old).encode(), allow_downgrade=True).spec.version == "0.1.0"
    old["spec"]["rules"] = {"maxRunTimeoutMs": 0}
    with pytest.raises(InvalidSpec, match=r"rules\.maxRunTimeoutMs must be > 0"):
        read_policy_pack(json.dumps(old).encode(), allow_downgrade=True)
    old["spec"]["version"] = "0.1"
    with pytest.raises(InvalidSpec, match=r"must be a MAJOR\.MINOR\.PATCH"):
        read_policy_pack(json.dumps(old).encode(), allow_downgrade=True)


@given(st.binary(max_size=100) | st.text('{}[]",:0 \n').map(str.encode))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with pytest.raises(InvalidSpec):
        read_policy_pack(raw)


# --- judging ------------------------------------------------------------------------------------------------------------------------------

BROKEN: list[tuple[str, Any, dict[str, Any], list[str]]] = [
    (
        "maxLifetimeTtlSeconds",
        59,
        {},
        ["spec.lifetime.ttlSeconds 60 exceeds policy maximum 59"],
    ),
    (
        "maxMemoryMaxBytes",
        1023,
        run(limits={"memoryMaxBytes": 1024}),
        ["spec.run.limits.memoryMaxBytes 1024 exceeds policy maximum 1023"],
    ),
    ("maxRunTimeoutMs", 999, run(timeoutMs=1000), ["spec.run.timeoutMs 1000 exceeds policy maximum 999"]),
    ("requireEgressDeclared", True, {}, ["policy requires spec.authority.egressRules to be non-empty"]),
    ("requireEgressDeclared", True, egress(), ["policy requires spec.authority.egressRules to be non-empty"]),
    (
        "forbidOutboundEgressRules",
        True,
        egress(("a", 1), ("b", 2)),
        ["policy forbids outbound egress rules but spec declares 2 rule(s)"],
    ),
    (
        "allowedEgressHosts",
        ["*.corp.example", 'say "hi"'],
        egress(("corp.example", 1), ("evil-corp.example", 1), ("a.corp.example", 1), ("corp.example", 2)),
        [
            r'egress host "corp.example" does not match any allowed pattern in ["*.corp.example", "say \"hi\""]',
            r'egress host "evil-corp.example" does not match any allowed pattern in ["*.corp.example", "say \"hi\""]',
        ],
    ),
    (
        "allowedEgressHosts",
        ["api.example"],
        egress(("API.example", 1)),
        ['egress host "API.example" does not match any allowed pattern in ["api.example"]'],
    ),
    ("requireRuntimeSecretDelivery", True, run(secretDelivery="env"), [NOT_ENV]),
    ("requireResourceLimits", True, run(), [UNLIMITED]),
    ("requireResourceLimits", True, run(limits={}), [UNLIMITED]),
    ("requireResourceLimits", True, run(limits={"gracefulShutdownSeconds": 5}), [UNLIMITED]),
    ("flagDnsEgressWithoutAcknowledgment", True, egress(("r", 53), ("s", 53, "tcp")), [COVERT]),
    ("flagDnsEgressWithoutAcknowledgment", True, egress(("r", 53, "udp")), [COVERT]),
    (
        "requireDnsEgressJustification",
        True,
        egress(("r", 53, "dns-acknowledged"), ("s", 53, "DNS-Acknowledged", " \u3000\t"), ("t", 53, "dns-acknowledged", "why")),
        [UNJUSTIFIED, UNJUSTIFIED],
    ),
]


@pytest.mark.parametrize(("rule", "value", "spec", "messages"), BROKEN)
def test_a_broken_rule_has_its_text(rule: str, value: Any, spec: dict[str, Any], messages: list[str]) -> None:
    found = violations(pack({rule: value}), cell(**spec))
    assert found == tuple(Violation(rule, message) for message in messages)
    assert [str(violation) for violation in found] == [f"[{rule}] {message}" for message in messages]


@pytest.mark.parametrize(
    ("rule", "value", "spec"),
    [
        ("maxLifetimeTtlSeconds", 60, {}),
        ("maxMemoryMaxBytes", 1024, run(limits={"memoryMaxBytes": 1024})),
        ("maxMemoryMaxBytes", 1, run()),
        ("maxRunTimeoutMs", 1000, run(timeoutMs=1000)),
        ("maxRunTimeoutMs", 1, run()),
        ("maxRunTimeoutMs", 1, {}),
        ("requireEgressDeclared", True, egress(("a", 1))),
        ("requireEgressDeclared", False, {}),
        ("forbidOutboundEgressRules", True, egress()),
        ("allowedEgressHosts", ["*"], egress(("anything at all", 1))),
        ("allowedEgressHosts", ["*.x"], egress(("a.x", 1), ("a.b.c.x", 1))),
        ("allowedEgressHosts", ["10.0.0.1"], egress(("10.0.0.1", 1))),
        ("allowedEgressHosts", [], egress(("a", 1))),
        ("allowedEgressHosts", ["b"], {}),
        ("requireRuntimeSecretDelivery", True, run()),
        ("requireRuntimeSecretDelivery", True, run(secretDelivery="runtimeBroker")),
        ("requireRuntimeSecretDelivery", True, {}),
        ("requireResourceLimits", True, run(limits={"memoryMaxBytes": 1})),
        ("requireResourceLimits", True, run(limits={"cpuMax": {"quotaMicros": 1}})),
        ("requireResourceLimits", True, {}),
        ("flagDnsEgressWithoutAcknowledgment", True, egress(("r", 53, "DNS-ACKNOWLEDGED"), ("s", 5353))),
        ("flagDnsEgressWithoutAcknowledgment", False, egress(("r", 53))),
        ("flagDnsEgressWithoutAcknowledgment", None, egress(("r", 53))),
        ("requireDnsEgressJustification", True, egress(("r", 53, "dns-acknowledged", "site resolver"), ("s", 53, "udp"))),
        ("requireDnsEgressJustification", True, egress(("r", 853, "dns-acknowledged"))),
        ("requireDnsEgressJustification", False, egress(("r", 53, "dns-acknowledged"))),
    ],
)
def test_what_keeps_a_rule_passes(rule: str, value: Any, spec: dict[str, Any]) -> None:
    assert violations(pack({rule: value}), cell(**spec)) == ()


def test_all_that_is_broken_is_told_in_the_order_of_the_rules() -> None:
    rules = {
        "requireDnsEgressJustification": True,
        "flagDnsEgressWithoutAcknowledgment": True,
        "requireResourceLimits": True,
        "requireRuntimeSecretDelivery": True,
        "allowedEgressHosts": ["z"],
        "forbidOutboundEgressRules": True,
        "maxRunTimeoutMs": 1,
        "maxLifetimeTtlSeconds": 1,
    }
    spec = cell(**run(secretDelivery="env", timeoutMs=2), **egress(("a", 53), ("b", 53, "dns-acknowledged")))
    assert [violation.rule for violation in violations(pack(rules), spec)] == [
        "maxLifetimeTtlSeconds",
        "maxRunTimeoutMs",
        "forbidOutboundEgressRules",
        "allowedEgressHosts",
        "allowedEgressHosts",
        "requireRuntimeSecretDelivery",
        "requireResourceLimits",
        "flagDnsEgressWithoutAcknowledgment",
        "requireDnsEgressJustification",
    ]


def test_every_rule_that_a_pack_may_hold_is_evaluated() -> None:
    assert (*(rule.name for rule in RULES), "secretRefAllowlist") == PolicyRules.__struct_encode_fields__
    assert {row[0] for row in BROKEN} == {rule.name for rule in RULES}


# --- placement ----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "given", "within"),
    [
        (None, None, True),
        (None, {"poolId": "a"}, True),
        ({}, None, True),
        ({}, {"poolId": "a"}, True),
        ({"poolId": "a"}, {"poolId": "a"}, True),
        ({"poolId": "a"}, {"poolId": "a", "queueName": "q"}, True),
        ({"poolId": "a"}, {"poolId": "A"}, False),
        ({"poolId": "a"}, {"queueName": "a"}, False),
        ({"poolId": "a"}, None, False),
        ({"poolId": "a", "queueName": "q"}, {"poolId": "a"}, False),
        (
            {"poolId": "a", "queueName": "q", "kubernetesNamespace": "n"},
            {"poolId": "a", "queueName": "q", "kubernetesNamespace": "n"},
            True,
        ),
        ({"kubernetesNamespace": "n"}, {"kubernetesNamespace": "m"}, False),
    ],
)
def test_a_pack_is_for_cells_of_its_placement(wanted: Any, given: Any, *, within: bool) -> None:
    demanding = pack({"maxLifetimeTtlSeconds": 1, "maxRunTimeoutMs": 1}, placement=wanted)
    spec = cell(placement=given, **run())
    assert applies(demanding, spec) is within
    assert bool(violations(demanding, spec)) is within
    assert (bounded(demanding, spec) != spec) is within


# --- limits that nobody declared ----------------------------------------------------------------------------------------------------------


def test_what_declares_no_limit_gets_the_packs() -> None:
    spec = bounded(pack({"maxMemoryMaxBytes": 4096, "maxRunTimeoutMs": 500}), cell(**run(limits={"cpuMax": {"quotaMicros": 7}})))
    assert spec.run is not None
    assert spec.run.limits is not None
    assert spec.run.limits.cpu_max is not None
    assert (spec.run.limits.memory_max_bytes, spec.run.limits.cpu_max.quota_micros, spec.run.timeout_ms) == (4096, 7, 500)


@pytest.mark.parametrize(
    ("rules", "spec"),
    [
        ({}, run()),
        ({"maxMemoryMaxBytes": 9, "maxRunTimeoutMs": 9}, {}),
        ({"maxMemoryMaxBytes": 9, "maxRunTimeoutMs": 9}, run(timeoutMs=8, limits={"memoryMaxBytes": 8})),
        ({"maxRunTimeoutMs": 60_000}, run()),  # the lifetime of 60 s is no longer
    ],
)
def test_what_is_within_the_pack_stays_as_it_is(rules: dict[str, Any], spec: dict[str, Any]) -> None:
    declared = cell(**spec)
    assert bounded(pack(rules), declared) is declared


@given(st.integers(1, 2**64 - 1), st.none() | st.integers(0, 60_000), st.integers(0, 100))
def test_a_bounded_spec_is_valid_and_never_above_the_pack(most: int, timeout: int | None, ttl: int) -> None:
    timeout = None if timeout is None or timeout > ttl * 1000 else timeout
    demanding = pack({"maxRunTimeoutMs": most, "maxMemoryMaxBytes": most})
    spec = cell(**run(timeoutMs=timeout), lifetime={"ttlSeconds": ttl})
    if violations(demanding, spec):
        return
    narrowed = bounded(demanding, spec)
    again = cell(**msgspec.to_builtins(narrowed))
    assert again.run is not None
    assert again.run.limits is not None
    assert again.run.limits.memory_max_bytes == most
    assert min(again.run.timeout_ms if again.run.timeout_ms is not None else 2**64, ttl * 1000) <= most


# --- callers ------------------------------------------------------------------------------------------------------------------------------

ADR = "policy pack rules.secretRefAllowlist; admission rejected per ADR-0007"


@pytest.mark.parametrize(
    ("allowlist", "caller", "secrets", "refusal"),
    [
        (None, "anybody", ["A"], None),
        ({}, "default", None, f'caller_unmapped: caller identity "default" is not present in {ADR}'),
        ({"ci": ["A"]}, "CI", [], f'caller_unmapped: caller identity "CI" is not present in {ADR}'),
        ({"ci": ["A"]}, "ci", None, None),
        ({"ci": []}, "ci", [], None),
        ({"ci": ["A", "B"]}, "ci", ["B", "A"], None),
        ({"ci": ["A"]}, "ci", ["A", "B", "C"], f'secret_ref_denied: caller "ci" is not granted secretRef "B" by {ADR}'),
        ({"ci": ["A"], "root": ["B"]}, "ci", ["B"], f'secret_ref_denied: caller "ci" is not granted secretRef "B" by {ADR}'),
        ({"ci": ["a"]}, "ci", ["A"], f'secret_ref_denied: caller "ci" is not granted secretRef "A" by {ADR}'),
    ],
)
def test_callers_get_the_secrets_that_the_pack_lists_for_them(allowlist: Any, caller: str, secrets: Any, refusal: str | None) -> None:
    assert caller_refusal(pack({"secretRefAllowlist": allowlist}), caller, cell(authority={"secretRefs": secrets})) == refusal


def test_no_placement_gets_a_caller_past_the_list() -> None:
    demanding = pack({"secretRefAllowlist": {}}, placement={"poolId": "a"})
    assert caller_refusal(demanding, "ci", cell(placement={"poolId": "b"})) is not None


def test_callers_are_no_violations() -> None:
    assert violations(pack({"secretRefAllowlist": {}}), cell(authority={"secretRefs": ["A"]})) == ()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*pack*.json")), ids=lambda path: path.stem)
def test_example_packs_are_valid(path: Path) -> None:
    assert read_policy_pack(path.read_bytes()).spec.id
