"""The PolicyPack document: what an operator demands of every cell, on top of what makes a spec valid.

A pack is read once, at start, and refused as a whole where anything in it is wrong: a misspelt rule would be no rule. Then each spec is
held against it; all that breaks a rule is told at once. Names of members and texts are compatible with CellOS 0.5.
"""

# No `from __future__ import annotations`: msgspec would have to evaluate each of the strings again.

from collections.abc import Callable, Iterator
from typing import Annotated, NamedTuple

from msgspec import Meta
from msgspec.structs import replace

from cellos.core.documents.execution_cell import (
    API_VERSION,
    CellSpec,
    EgressRule,
    Limits,
    NonEmpty,
    Placement,
    Portable,
    Positive,
    Run,
    Semver,
    Wire,
)
from cellos.core.documents.identifiers import (
    NAMESPACE,
    NAMESPACE_RULE,
    PORTABLE_RULE,
    WHITE_SPACE,
    ascii_lower,
    is_portable,
    matches,
)
from cellos.core.documents.parse import Syntax, decode
from cellos.core.documents.rules import Fault, Faults
from cellos.core.documents.shape import to_struct
from cellos.core.documents.wording import quoted
from cellos.core.policy.version import version_faults
from cellos.errors import InvalidSpec, SpecSyntaxError

KIND = "PolicyPack"

DNS_PORT = 53
DNS_ACKNOWLEDGED = "dns-acknowledged"
"""The protocol of an egress rule that says: this is port 53, and we mean it. Compared without regard to ASCII case."""


class PolicyRules(Wire, frozen=True, kw_only=True):
    """The rules of a pack. All may be absent; `{}` demands nothing."""

    max_lifetime_ttl_seconds: Positive | None = None
    max_memory_max_bytes: Positive | None = None
    max_run_timeout_ms: Positive | None = None
    require_egress_declared: bool = False
    forbid_outbound_egress_rules: bool = False
    allowed_egress_hosts: tuple[NonEmpty, ...] = ()
    require_runtime_secret_delivery: bool = False
    require_resource_limits: bool = False
    flag_dns_egress_without_acknowledgment: bool | None = None
    require_dns_egress_justification: bool | None = None
    secret_ref_allowlist: dict[str, tuple[str, ...]] | None = None


class PackSpec(Wire, frozen=True, kw_only=True):
    """`placement` absent or empty: the pack is for every cell."""

    id: Portable
    description: str | None = None
    version: Semver | None = None
    placement: Placement | None = None
    rules: PolicyRules


class PolicyPack(Wire, frozen=True, kw_only=True):
    """The whole document: `cellos.io/v1`, `PolicyPack`."""

    api_version: Annotated[str, Meta(extra_json_schema={"const": API_VERSION})]
    kind: Annotated[str, Meta(extra_json_schema={"const": KIND})]
    spec: PackSpec


# --- reading ----------------------------------------------------------------------------------------------------------------------------


def read_policy_pack(raw: bytes, *, allow_downgrade: bool = False, syntax: Syntax = "json") -> PolicyPack:
    """One pack: strict JSON or YAML, then shape, then the checks in their order; the first fault is the error.

    `allow_downgrade` takes a pack that is older than the oldest supported version; it is checked like any other. Raises SpecSyntaxError
    where it is not a well-formed document, InvalidSpec where it breaks a check.
    """
    value = decode(raw, syntax)
    try:
        pack = to_struct(value, PolicyPack)
    except SpecSyntaxError:
        # Another kind of document has another shape: that it is another kind is the better answer.
        if isinstance(value, dict):
            for fault in _head_faults(value.get("apiVersion"), value.get("kind")):
                raise InvalidSpec(fault.text, path=fault.path) from None
        raise
    for fault in pack_faults(pack, allow_downgrade=allow_downgrade):
        raise InvalidSpec(fault.text, path=fault.path)
    return pack


def pack_faults(pack: PolicyPack, *, allow_downgrade: bool = False) -> Faults:
    """Everything that is wrong with a well-shaped pack, in the order of the checks."""
    for check in CHECKS:
        yield from check(pack, allow_downgrade)


def _head_faults(api_version: object, kind: object) -> Faults:
    if isinstance(api_version, str) and api_version != API_VERSION:
        yield Fault(f"policy pack apiVersion must be {quoted(API_VERSION)}, got {quoted(api_version)}", "apiVersion")
    if isinstance(kind, str) and kind != KIND:
        yield Fault(f"policy pack kind must be {quoted(KIND)}, got {quoted(kind)}", "kind")


def _head(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    yield from _head_faults(pack.api_version, pack.kind)


def _id(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    if not is_portable(pack.spec.id):
        yield Fault(f"policy pack spec.id {quoted(pack.spec.id)} is not a valid portable identifier", "spec.id")


def _version(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    if pack.spec.version is not None:
        yield from (Fault(text, "spec.version") for text in version_faults(pack.spec.version, allow_downgrade=allow_downgrade))


def _caps(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    rules = pack.spec.rules
    for name, most in (
        ("maxLifetimeTtlSeconds", rules.max_lifetime_ttl_seconds),
        ("maxMemoryMaxBytes", rules.max_memory_max_bytes),
        ("maxRunTimeoutMs", rules.max_run_timeout_ms),
    ):
        if most == 0:
            yield Fault(f"policy pack rules.{name} must be > 0", f"spec.rules.{name}")


def _egress_contradiction(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    if pack.spec.rules.require_egress_declared and pack.spec.rules.forbid_outbound_egress_rules:
        yield Fault(
            "policy pack rules.requireEgressDeclared and rules.forbidOutboundEgressRules are mutually exclusive",
            "spec.rules.requireEgressDeclared",
        )


def _egress_patterns(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    for index, pattern in enumerate(pack.spec.rules.allowed_egress_hosts):
        if not pattern.strip(WHITE_SPACE):
            yield Fault("policy pack rules.allowedEgressHosts contains an empty pattern", f"spec.rules.allowedEgressHosts[{index}]")


def _placement(pack: PolicyPack, allow_downgrade: bool) -> Faults:
    """No valid spec has such a placement: the pack would be for no cell at all, and nobody would notice."""
    if (placement := pack.spec.placement) is None:
        return
    for name, value in (("poolId", placement.pool_id), ("queueName", placement.queue_name)):
        if value is not None and not is_portable(value):
            yield Fault(f"policy pack spec.placement.{name} {PORTABLE_RULE}", f"spec.placement.{name}")
    if placement.kubernetes_namespace is not None and not matches(NAMESPACE, placement.kubernetes_namespace):
        path = "spec.placement.kubernetesNamespace"
        yield Fault(f"policy pack {path} {NAMESPACE_RULE}", path)


CHECKS: tuple[Callable[[PolicyPack, bool], Faults], ...] = (
    _head,
    _id,
    _version,
    _caps,
    _egress_contradiction,
    _egress_patterns,
    _placement,
)
"""The last one is ours; the others are those of CellOS 0.5, in its order."""


# --- judging ----------------------------------------------------------------------------------------------------------------------------


class Violation(NamedTuple):
    """`rule` is the member of `rules` that is broken. Printed as `[rule] message`."""

    rule: str
    message: str

    def __str__(self) -> str:
        return f"[{self.rule}] {self.message}"


class PackRule(NamedTuple):
    """`refuses` completes "refuses a cell …" in the reference page."""

    name: str
    refuses: str
    messages: Callable[[PolicyRules, CellSpec], Iterator[str]]


def applies(pack: PolicyPack, spec: CellSpec) -> bool:
    """Whether the cell is within the pack's placement: each member that the pack sets, the spec sets to the same."""
    wanted = pack.spec.placement or Placement()
    given = spec.placement or Placement()
    return all(getattr(wanted, name) in {None, getattr(given, name)} for name in Placement.__struct_fields__)


def violations(pack: PolicyPack, spec: CellSpec) -> tuple[Violation, ...]:
    """Everything in which the spec breaks the pack, in the order of RULES; nothing where the pack does not apply."""
    if not applies(pack, spec):
        return ()
    return tuple(Violation(rule.name, message) for rule in RULES for message in rule.messages(pack.spec.rules, spec))


def bounded(pack: PolicyPack, spec: CellSpec) -> CellSpec:
    """The spec with the pack's maxima where it declares no limit of its own: what nobody limited would pass every maximum."""
    if spec.run is None or not applies(pack, spec):
        return spec
    run, rules = spec.run, pack.spec.rules
    limits = run.limits or Limits()
    if rules.max_memory_max_bytes is not None and limits.memory_max_bytes is None:
        run = replace(run, limits=replace(limits, memory_max_bytes=rules.max_memory_max_bytes))
    longest = spec.lifetime.ttl_seconds * 1000
    if rules.max_run_timeout_ms is not None and run.timeout_ms is None and longest > rules.max_run_timeout_ms:
        run = replace(run, timeout_ms=rules.max_run_timeout_ms)
    return spec if run is spec.run else replace(spec, run=run)


def caller_refusal(pack: PolicyPack, caller: str, spec: CellSpec) -> str | None:
    """Why `caller` may not have what the spec asks for, None where it may.

    It is about who asks, not about where the cell runs: the pack's placement does not matter.
    """
    allowlist = pack.spec.rules.secret_ref_allowlist
    if allowlist is None:
        return None
    because = "policy pack rules.secretRefAllowlist; admission rejected per ADR-0007"
    if caller not in allowlist:
        return f"caller_unmapped: caller identity {quoted(caller)} is not present in {because}"
    denied = next((ref for ref in spec.authority.secret_refs or () if ref not in allowlist[caller]), None)
    if denied is None:
        return None
    return f"secret_ref_denied: caller {quoted(caller)} is not granted secretRef {quoted(denied)} by {because}"


def _egress(spec: CellSpec) -> tuple[EgressRule, ...]:
    return spec.authority.egress_rules or ()


def _limits(spec: CellSpec) -> Limits:
    return (spec.run and spec.run.limits) or Limits()


def _exceeds(member: str, declared: int | None, most: int | None) -> Iterator[str]:
    if declared is not None and most is not None and declared > most:
        yield f"{member} {declared} exceeds policy maximum {most}"


def _lifetime(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    yield from _exceeds("spec.lifetime.ttlSeconds", spec.lifetime.ttl_seconds, rules.max_lifetime_ttl_seconds)


def _memory(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    yield from _exceeds("spec.run.limits.memoryMaxBytes", _limits(spec).memory_max_bytes, rules.max_memory_max_bytes)


def _timeout(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    yield from _exceeds("spec.run.timeoutMs", spec.run.timeout_ms if spec.run else None, rules.max_run_timeout_ms)


def _egress_declared(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if rules.require_egress_declared and not _egress(spec):
        yield "policy requires spec.authority.egressRules to be non-empty"


def _egress_forbidden(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if rules.forbid_outbound_egress_rules and (count := len(_egress(spec))):
        yield f"policy forbids outbound egress rules but spec declares {count} rule(s)"


def _egress_hosts(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    patterns = rules.allowed_egress_hosts
    if not patterns:
        return
    shown = ", ".join(map(quoted, patterns))
    for host in dict.fromkeys(rule.host for rule in _egress(spec)):
        if not any(_is_allowed(host, pattern) for pattern in patterns):
            yield f"egress host {quoted(host)} does not match any allowed pattern in [{shown}]"


def _is_allowed(host: str, pattern: str) -> bool:
    """`*` is anything, `*.x` whatever ends with `.x`, all else itself. Case matters: `API.example` is not `api.example`."""
    return pattern in {"*", host} or (pattern.startswith("*.") and host.endswith(pattern[1:]))


def _secret_delivery(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if rules.require_runtime_secret_delivery and spec.run and spec.run.secret_delivery == "env":
        yield "policy requires spec.run.secretDelivery to be runtimeBroker or runtimeLeasedBroker, not env"


def _limited(run: Run) -> bool:
    return run.limits is not None and (run.limits.memory_max_bytes is not None or run.limits.cpu_max is not None)


def _resource_limits(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if rules.require_resource_limits and spec.run and not _limited(spec.run):
        yield "policy requires spec.run.limits to be declared"


def _is_acknowledged(rule: EgressRule) -> bool:
    return ascii_lower(rule.protocol or "") == DNS_ACKNOWLEDGED


def _dns_acknowledgment(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if rules.flag_dns_egress_without_acknowledgment and any(rule.port == DNS_PORT and not _is_acknowledged(rule) for rule in _egress(spec)):
        yield (
            "spec declares port 53 (DNS) egress without acknowledgment — DNS can be used as a covert exfiltration channel;"
            f" set protocol: {DNS_ACKNOWLEDGED} to acknowledge this risk"
        )


def _dns_justification(rules: PolicyRules, spec: CellSpec) -> Iterator[str]:
    if not rules.require_dns_egress_justification:
        return
    for rule in _egress(spec):
        if rule.port == DNS_PORT and _is_acknowledged(rule) and not (rule.dns_egress_justification or "").strip(WHITE_SPACE):
            yield f"port-53 egress rule with protocol {DNS_ACKNOWLEDGED} requires a non-empty dnsEgressJustification field"


RULES: tuple[PackRule, ...] = (
    PackRule("maxLifetimeTtlSeconds", "whose `lifetime.ttlSeconds` is more", _lifetime),
    PackRule("maxMemoryMaxBytes", "whose `run.limits.memoryMaxBytes` is more; one that declares none gets this maximum", _memory),
    PackRule("maxRunTimeoutMs", "whose `run.timeoutMs` is more; one that declares none gets this maximum", _timeout),
    PackRule("requireEgressDeclared", "without egress rules", _egress_declared),
    PackRule("forbidOutboundEgressRules", "with egress rules", _egress_forbidden),
    PackRule("allowedEgressHosts", "with a host that matches no pattern of a non-empty list", _egress_hosts),
    PackRule("requireRuntimeSecretDelivery", "whose command gets its secrets as variables (`secretDelivery: env`)", _secret_delivery),
    PackRule("requireResourceLimits", "whose command has neither `limits.memoryMaxBytes` nor `limits.cpuMax`", _resource_limits),
    PackRule(
        "flagDnsEgressWithoutAcknowledgment",
        "with port 53, UDP or TCP, under another protocol than `dns-acknowledged`",
        _dns_acknowledgment,
    ),
    PackRule(
        "requireDnsEgressJustification", "with port 53 under `dns-acknowledged` and a blank `dnsEgressJustification`", _dns_justification
    ),
)
"""Every member of `rules` but `secretRefAllowlist`, which is about the caller: see `caller_refusal`."""
