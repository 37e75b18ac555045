"""Each member of these events is held to what it was made of, and changes with it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from msgspec.structs import replace

from cellos.core import observations
from cellos.core.documents import CellSpec, Identity, parse_execution_cell
from cellos.core.events import STARTED, Draft, RunIdentity

RUN = RunIdentity(cell_id="cell-1", spec_id="spec-1", run_id="run-1", spec_hash="ab" * 32)
CORRELATION = {"platform": "ci", "externalRunId": None, "externalJobId": None, "labels": None, "tenantId": "acme"}
FULL_RUN = RunIdentity(
    cell_id="cell-2",
    spec_id="spec-2",
    run_id="run-2",
    spec_hash="cd" * 32,
    correlation=CORRELATION,
    tenant_id="acme",
    placement={"poolId": "p"},
)
ABOUT = {"cellId": "cell-1", "specId": "spec-1", "runId": "run-1"}
ABOUT_FULL = {"cellId": "cell-2", "specId": "spec-2", "runId": "run-2", "correlation": CORRELATION}
LABELS = {"keysetId": "set", "issuerKid": "kid"}
OTHER_LABELS = {"keysetId": "other set", "issuerKid": "other kid"}
IDENTITY = Identity(kind="federatedOidc", provider="github", audience="https://aud", secret_ref="TOKEN")
OTHER_IDENTITY = Identity(kind="federatedOidc", provider="gitlab", audience="https://x", subject="me", ttl_seconds=9, secret_ref="T2")
IDENTITY_WIRE = {
    "kind": "federatedOidc",
    "provider": "github",
    "audience": "https://aud",
    "subject": None,
    "ttlSeconds": None,
    "secretRef": "TOKEN",
}
OTHER_IDENTITY_WIRE = {
    "kind": "federatedOidc",
    "provider": "gitlab",
    "audience": "https://x",
    "subject": "me",
    "ttlSeconds": 9,
    "secretRef": "T2",
}


def spec(*, authority: dict[str, Any] | None = None, **members: Any) -> CellSpec:
    body = {"id": "spec-1", "authority": authority or {}, "lifetime": {"ttlSeconds": 60}, **members}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode()).spec


def run(**members: Any) -> dict[str, Any]:
    return {"run": {"argv": ["true"], "secretDelivery": "env", **members}}


def rules(*names: str) -> list[dict[str, Any]]:
    return [{"host": name, "port": 443} for name in names]


def same(draft: Draft, kind: str, data: dict[str, Any]) -> None:
    assert draft.type == f"dev.cellos.events.cell.{kind}"
    assert draft.data == data


class TestNetwork:
    def test_scope(self) -> None:
        kind = "observability.v1.network_scope"
        same(observations.network_scope(RUN, spec()), kind, {**ABOUT, "egressRuleCount": 0, "hasOpaqueNetworkAuthority": False})
        asks = spec(authority={"egressRules": rules("a", "b")})
        same(observations.network_scope(FULL_RUN, asks), kind, {**ABOUT_FULL, "egressRuleCount": 2, "hasOpaqueNetworkAuthority": False})

    def test_an_opaque_network_is_told(self) -> None:
        """Documents with one are refused today; the event does not depend on that."""
        asks = spec()
        opaque = replace(asks, authority=replace(asks.authority, network={"any": 1}))
        assert observations.network_scope(RUN, opaque).data["hasOpaqueNetworkAuthority"] is True

    @pytest.mark.parametrize(("digest", "updated", "labels"), [("sha256:a", "then", LABELS), ("sha256:b", "now", OTHER_LABELS)])
    def test_target_set(self, digest: str, updated: str, labels: dict[str, str]) -> None:
        data = {
            "fqdn": "declared-egress.trust.cellos.internal",
            "previousDigest": "empty",
            "currentDigest": digest,
            "reason": "refresh",
            "updatedAt": updated,
        }
        draft = observations.dns_target_set(RUN, digest=digest, updated_at=updated, labels=labels)
        same(draft, "observability.v1.dns_target_set", {**ABOUT, **data, **labels})

    @pytest.mark.parametrize(
        ("fqdn", "targets", "digest", "labels"),
        [
            ("a.example", [], "sha256:a", LABELS),
            ("b.example", [{"address": "192.0.2.1", "family": "inet", "port": 1}], "sha256:b", OTHER_LABELS),
        ],
    )
    def test_resolution(self, fqdn: str, targets: list[dict[str, Any]], digest: str, labels: dict[str, str]) -> None:
        draft = observations.dns_resolution(FULL_RUN, fqdn=fqdn, resolved_at="now", targets=targets, digest=digest, labels=labels)
        data = {
            "receiptId": f"rcp-run-2-{fqdn}",
            "fqdn": fqdn,
            "resolvedAt": "now",
            "targets": targets,
            "ttlSeconds": None,
            "ttlReason": "the host's resolver does not tell it",
            "policyDigest": digest,
        }
        same(draft, "observability.v1.dns_resolution", {**ABOUT_FULL, **data, **labels})

    @pytest.mark.parametrize(
        ("allowed", "action", "rule", "labels"), [(True, "allow", "authority.egressRules[0]", LABELS), (False, "deny", None, OTHER_LABELS)]
    )
    def test_decision(self, allowed: bool, action: str, rule: str | None, labels: dict[str, str]) -> None:
        draft = observations.l7_egress_decision(
            RUN, decision_id=f"id-{action}", allowed=allowed, host=f"{action}.example", reason_code=f"because_{action}",
            rule=rule, digest=f"sha256:{action}", labels=labels,
        )  # fmt: skip
        data = {
            "decisionId": f"id-{action}",
            "action": action,
            "sniHost": f"{action}.example",
            "policyDigest": f"sha256:{action}",
            "reasonCode": f"because_{action}",
            **({"ruleRef": rule} if rule else {}),
        }
        same(draft, "observability.v1.l7_egress_decision", {**ABOUT, **data, **labels})

    def test_policy(self) -> None:
        kind = "observability.v1.network_policy"
        nothing = {**ABOUT, "isolationMode": "clone_newnet", "declaredEgressCount": 0, "declaredEgress": []}
        same(observations.network_policy(RUN, ()), kind, nothing)
        authority = {
            "egressRules": [
                {"host": "a.example", "port": 443, "protocol": "tls"},
                {"host": "dns.example", "port": 53, "dnsEgressJustification": "we need it"},
            ]
        }
        told = observations.network_policy(RUN, spec(authority=authority).authority.egress_rules or ()).data
        assert told["declaredEgressCount"] == 2
        assert told["declaredEgress"] == [
            {"host": "a.example", "port": 443, "protocol": "tls"},
            {"host": "dns.example", "port": 53, "protocol": None, "dnsEgressJustification": "we need it"},
        ]

    @pytest.mark.parametrize(("count", "code", "error"), [(0, 0, None), (2, -1, "No such file or directory (os error 2)")])
    def test_enforcement(self, count: int, code: int, error: str | None) -> None:
        draft = observations.network_enforcement(RUN, rule_count=count, exit_code=code, spawn_error=error)
        data = {
            "isolationMode": "clone_newnet",
            "nftRulesApplied": False,
            "declaredEgressRuleCount": count,
            "supplementaryEgressFilterActive": False,
            "commandExitCode": code,
            **({"spawnError": error} if error else {}),
        }
        same(draft, "observability.v1.network_enforcement", {**ABOUT, **data})


@pytest.mark.parametrize(
    ("digits", "privileged", "no_new_privs", "mode"), [("0" * 16, False, True, 2), ("000001ffffffffff", True, False, 0)]
)
def test_container_security(digits: str, privileged: bool, no_new_privs: bool, mode: int) -> None:
    capabilities = dict.fromkeys(("capEff", "capPrm", "capBnd", "capAmb", "capInh"), digits)
    draft = observations.container_security(
        FULL_RUN, capabilities=capabilities, privileged=privileged, no_new_privs=no_new_privs, seccomp_mode=mode
    )
    data = {**capabilities, "privileged": privileged, "noNewPrivs": no_new_privs, "seccompMode": mode}
    same(draft, "observability.v1.container_security", {"cellId": "cell-2", "runId": "run-2", **data})


@pytest.mark.parametrize(
    ("stream", "offset", "content", "truncated"),
    [("stdout", 0, {"text": "hello\n"}, False), ("stderr", 6, {"base64": "/w=="}, True)],
)
def test_command_output(stream: str, offset: int, content: dict[str, Any], truncated: bool) -> None:
    draft = observations.command_output(RUN, stream=stream, offset=offset, content=content, truncated=truncated)
    data = {"stream": stream, "offset": offset, **content, **({"truncated": True} if truncated else {})}
    same(draft, "command.v1.output", {**ABOUT, **data})


@pytest.mark.parametrize(("identity", "wire"), [(IDENTITY, IDENTITY_WIRE), (OTHER_IDENTITY, OTHER_IDENTITY_WIRE)])
class TestIdentity:
    def test_materialized(self, identity: Identity, wire: dict[str, Any]) -> None:
        same(observations.identity_materialized(RUN, identity), "identity.v1.materialized", {**ABOUT, "identity": wire})

    @pytest.mark.parametrize(("operation", "reason"), [("materialize", "no answer"), ("revoke", "refused")])
    def test_failed(self, identity: Identity, wire: dict[str, Any], operation: str, reason: str) -> None:
        draft = observations.identity_failed(FULL_RUN, identity, operation=operation, reason=reason)
        same(draft, "identity.v1.failed", {**ABOUT_FULL, "identity": wire, "operation": operation, "reason": reason})

    def test_revoked(self, identity: Identity, wire: dict[str, Any]) -> None:
        data = {**ABOUT, "identity": wire, "reason": "teardown"}
        same(observations.identity_revoked(RUN, identity, provenance=None), "identity.v1.revoked", data)
        origin = {"provenance": {"parent": "id-1", "parentType": STARTED}}
        same(observations.identity_revoked(RUN, identity, provenance="id-1"), "identity.v1.revoked", {**data, **origin})


@pytest.mark.parametrize(("of", "role"), [(RUN, "ci"), (FULL_RUN, "release")])
def test_universal_token(of: RunIdentity, role: str) -> None:
    draft = observations.universal_token(of, role_root=role)
    assert draft.type.endswith("identity.v1.universal_token_accepted_in_permissive_mode")
    reason, remediation = draft.data.pop("reason"), draft.data.pop("remediation")
    assert draft.data == {"cellId": of.cell_id, "runId": of.run_id, "specId": of.spec_id, "specHash": of.spec_hash, "roleRoot": role}
    for text in (reason, remediation):
        assert "universal" in text
        assert "permissive" in text
    assert "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS" in remediation


PLAIN: dict[str, Any] = {
    "lifetimeTtlSeconds": 60,
    "egressRuleCount": 0,
    "resourceLimitsPresent": False,
    "secretDeliveryMode": "env",
    "exportTargetCount": 0,
}


class TestSummary:
    def test_of_nothing(self) -> None:
        same(
            observations.compliance_summary(RUN, spec(), limits_declared=False, exit_code=None), "compliance.v1.summary", {**ABOUT, **PLAIN}
        )

    @pytest.mark.parametrize(
        ("members", "changes"),
        [
            ({"lifetime": {"ttlSeconds": 61}}, {"lifetimeTtlSeconds": 61}),
            ({"authority": {"egressRules": rules("a", "b")}}, {"egressRuleCount": 2}),
            (run(), {}),
            (run(secretDelivery="runtimeBroker"), {"secretDeliveryMode": "runtimeBroker"}),
            (run(secretDelivery="runtimeLeasedBroker"), {"secretDeliveryMode": "runtimeLeasedBroker"}),
            ({"export": {"artifacts": [{"name": "a", "path": "a"}]}}, {}),
            ({"export": {"targets": [{"kind": "s3", "name": "t", "bucket": "b"}]}}, {"exportTargetCount": 1}),
            ({"policy": {"packId": "pack"}}, {"policyPackId": "pack"}),
            ({"policy": {"packId": "pack", "packVersion": "1.2.3"}}, {"policyPackId": "pack", "policyPackVersion": "1.2.3"}),
            ({"policy": {"bundleDigest": "sha256:" + "0" * 64}}, {"policyBundleDigest": "sha256:" + "0" * 64}),
        ],
    )
    def test_what_changes_it(self, members: dict[str, Any], changes: dict[str, Any]) -> None:
        assert observations.compliance_summary(RUN, spec(**members), limits_declared=False, exit_code=None).data == {
            **ABOUT,
            **PLAIN,
            **changes,
        }

    @pytest.mark.parametrize("limited", [False, True])
    def test_the_limits(self, limited: bool) -> None:
        data = observations.compliance_summary(RUN, spec(), limits_declared=limited, exit_code=None).data
        assert data["resourceLimitsPresent"] is limited

    @pytest.mark.parametrize("code", [0, 3, -1])
    def test_the_exit_code(self, code: int) -> None:
        assert observations.compliance_summary(RUN, spec(), limits_declared=False, exit_code=code).data["commandExitCode"] == code

    def test_the_run(self) -> None:
        data = observations.compliance_summary(FULL_RUN, spec(), limits_declared=False, exit_code=None).data
        assert data == {**ABOUT_FULL, **PLAIN, "placement": {"poolId": "p"}}


def books(of: CellSpec, *, connections: int | None = None, fetched: frozenset[str] | None = None) -> dict[str, Any]:
    draft = observations.homeostasis(RUN, of, digest="sha256:d", connections=connections, fetched_secrets=fetched)
    assert draft.type == "dev.cellos.events.cell.authority.v1.homeostasis"
    return draft.data


class TestHomeostasis:
    def test_of_nothing(self) -> None:
        assert books(spec()) == {
            **ABOUT,
            "specHash": "sha256:d",
            "declaredEgressRules": 0,
            "exercisedEgressConnections": None,
            "exercisedEgressReason": "telemetry_pending_L2-04",
            "declaredSecretCount": 0,
            "declaredMountPaths": 0,
            "accessedMountPaths": 0,
            "authorityEfficiency": 1.0,
            "recommendedRemovals": [],
        }

    @pytest.mark.parametrize(
        ("declared", "connections", "efficiency"),
        [(0, 0, 1.0), (2, 0, 0.0), (2, 1, 0.5), (2, 2, 1.0), (2, 9, 1.0), (0, 9, 1.0), (2, None, 1.0)],
    )
    def test_connections(self, declared: int, connections: int | None, efficiency: float) -> None:
        told = books(spec(authority={"egressRules": rules(*"abc"[:declared])}), connections=connections)
        assert (told["declaredEgressRules"], told["exercisedEgressConnections"]) == (declared, connections)
        assert told["authorityEfficiency"] == efficiency
        assert ("exercisedEgressReason" in told) == (connections is None), "a number needs no excuse"

    def test_mounts_are_declared_and_nobody_watches_them(self) -> None:
        mounts = [{"source": f"/{name}", "target": f"/mnt/{name}", "mode": "ro"} for name in "ab"]
        told = books(spec(authority={"filesystem": {"mounts": mounts}}))
        assert (told["declaredMountPaths"], told["accessedMountPaths"]) == (2, None)
        assert told["accessedMountReason"] == "nothing watches which files of a mount are read"

    @pytest.mark.parametrize(
        ("fetched", "count", "removals"),
        [
            (frozenset(), 0, ["A", "B"]),
            (frozenset({"B"}), 1, ["A"]),
            (frozenset({"A", "B"}), 2, []),
            (frozenset({"ELSE"}), 0, ["A", "B"]),
        ],
    )
    def test_secrets_that_are_asked_for(self, fetched: frozenset[str], count: int, removals: list[str]) -> None:
        told = books(spec(authority={"secretRefs": ["A", "B"]}), fetched=fetched)
        assert (told["declaredSecretCount"], told["exercisedSecretCount"]) == (2, count)
        assert told["recommendedRemovals"] == [{"kind": "secretRef", "name": name} for name in removals]

    def test_of_secrets_that_are_handed_over_nobody_knows(self) -> None:
        told = books(spec(authority={"secretRefs": ["A", "B"]}))
        assert told["declaredSecretCount"] == 2
        assert "exercisedSecretCount" not in told
        assert told["recommendedRemovals"] == []


class TestRefusals:
    def test_by_a_policy_pack(self) -> None:
        draft = observations.policy_rejected(RUN, spec(), violations=[("maxRunTimeoutMs", "too long")])
        data = {"specId": "spec-1", "violationCount": 1, "violations": [{"rule": "maxRunTimeoutMs", "message": "too long"}]}
        same(draft, "policy.v1.rejected", data)

    def test_the_pack_is_the_documents_word(self) -> None:
        asks = spec(policy={"packId": "pack", "packVersion": "1.2.3"})
        data = observations.policy_rejected(FULL_RUN, asks, violations=[("a", "1"), ("b", "2")]).data
        assert data == {
            "specId": "spec-2",
            "violationCount": 2,
            "violations": [{"rule": "a", "message": "1"}, {"rule": "b", "message": "2"}],
            "policyPackId": "pack",
            "policyPackVersion": "1.2.3",
            "correlation": CORRELATION,
        }

    def test_by_an_authorization_policy(self) -> None:
        draft = observations.authz_rejected(RUN, reason="subject_not_authorized", message="who?", pool_id=None, pack_id=None)
        same(draft, "authz.v1.rejected", {"specId": "spec-1", "reason": "subject_not_authorized", "message": "who?"})

    def test_with_all_that_is_known(self) -> None:
        data = observations.authz_rejected(FULL_RUN, reason="pool_not_allowed", message="no", pool_id="p", pack_id="k").data
        assert data == {
            "specId": "spec-2",
            "reason": "pool_not_allowed",
            "message": "no",
            "tenantId": "acme",
            "subject": "acme",
            "deniedPoolId": "p",
            "deniedPolicyPackId": "k",
            "correlation": CORRELATION,
        }


@pytest.mark.parametrize("number", [1, 2])
class TestKeysets:
    def test_verified(self, number: int) -> None:
        draft = observations.keyset_verified(
            keyset_id=f"set-{number}", payload_digest=f"sha256:{number}", signer_kid=f"kid-{number}", verified_at=f"then-{number}"
        )
        data = {
            "schemaVersion": "1.0.0",
            "keysetId": f"set-{number}",
            "payloadDigest": f"sha256:{number}",
            "verifiedSignerKid": f"kid-{number}",
            "verifiedAt": f"then-{number}",
        }
        same(draft, "trust.v1.keyset_verified", data)

    def test_failed(self, number: int) -> None:
        draft = observations.keyset_verification_failed(attempted=f"{number}.json", reason=f"why-{number}", failed_at=f"then-{number}")
        data = {
            "schemaVersion": "1.0.0",
            "attemptedKeysetPath": f"{number}.json",
            "reason": f"why-{number}",
            "failedAt": f"then-{number}",
        }
        same(draft, "trust.v1.keyset_verification_failed", data)
