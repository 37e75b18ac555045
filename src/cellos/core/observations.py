"""Events that a run reports beside its course: what it may do, what was measured, who refused it, how its books close.

Constructors give drafts, as in core/events.py. A value is measured or comes from the document. What was not measured is null with the
reason beside it, or left out; it is never made up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from cellos.core.documents import CellSpec, EgressRule, Identity
from cellos.core.events import PREFIX, Draft, RunIdentity, about, present, provenance_of

NETWORK_SCOPE = PREFIX + "observability.v1.network_scope"
DNS_TARGET_SET = PREFIX + "observability.v1.dns_target_set"
DNS_RESOLUTION = PREFIX + "observability.v1.dns_resolution"
L7_EGRESS_DECISION = PREFIX + "observability.v1.l7_egress_decision"
CONTAINER_SECURITY = PREFIX + "observability.v1.container_security"
NETWORK_POLICY = PREFIX + "observability.v1.network_policy"
NETWORK_ENFORCEMENT = PREFIX + "observability.v1.network_enforcement"
COMMAND_OUTPUT = PREFIX + "command.v1.output"
IDENTITY_MATERIALIZED = PREFIX + "identity.v1.materialized"
IDENTITY_FAILED = PREFIX + "identity.v1.failed"
IDENTITY_REVOKED = PREFIX + "identity.v1.revoked"
UNIVERSAL_TOKEN = PREFIX + "identity.v1.universal_token_accepted_in_permissive_mode"
COMPLIANCE_SUMMARY = PREFIX + "compliance.v1.summary"
HOMEOSTASIS = PREFIX + "authority.v1.homeostasis"
POLICY_REJECTED = PREFIX + "policy.v1.rejected"
AUTHZ_REJECTED = PREFIX + "authz.v1.rejected"
KEYSET_VERIFIED = PREFIX + "trust.v1.keyset_verified"
KEYSET_VERIFICATION_FAILED = PREFIX + "trust.v1.keyset_verification_failed"

TRUST_SCHEMA = "1.0.0"
DECLARED_EGRESS = "declared-egress.trust.cellos.internal"
"""The name under which the set of declared destinations is reported."""
NO_DIGEST = "empty"
NEW_NETWORK = "clone_newnet"
NOT_COUNTED = "telemetry_pending_L2-04"
"""Reason of an unknown number of connections: nothing counts them."""


def network_scope(run: RunIdentity, spec: CellSpec) -> Draft:
    """How much of the network the document asks for: the first event of a run."""
    return Draft(
        NETWORK_SCOPE,
        {
            **about(run),
            "egressRuleCount": len(spec.authority.egress_rules or ()),
            "hasOpaqueNetworkAuthority": spec.authority.network is not None,
        },
    )


def dns_target_set(run: RunIdentity, *, digest: str, updated_at: str, labels: Mapping[str, str]) -> Draft:
    """The declared destinations, by the digest of the spec. `labels` are keysetId and issuerKid."""
    data = {"fqdn": DECLARED_EGRESS, "previousDigest": NO_DIGEST, "currentDigest": digest, "reason": "refresh", "updatedAt": updated_at}
    return Draft(DNS_TARGET_SET, {**about(run), **data, **labels})


def dns_resolution(
    run: RunIdentity, *, fqdn: str, resolved_at: str, targets: Sequence[Mapping[str, Any]], digest: str, labels: Mapping[str, str]
) -> Draft:
    """What the host's resolver says of a declared host. It does not say for how long: `ttlSeconds` is null."""
    data = {
        "receiptId": f"rcp-{run.run_id}-{fqdn}",
        "fqdn": fqdn,
        "resolvedAt": resolved_at,
        "targets": [dict(target) for target in targets],
        "ttlSeconds": None,
        "ttlReason": "the host's resolver does not tell it",
        "policyDigest": digest,
    }
    return Draft(DNS_RESOLUTION, {**about(run), **data, **labels})


def l7_egress_decision(
    run: RunIdentity,
    *,
    decision_id: str,
    allowed: bool,
    host: str,
    reason_code: str,
    rule: str | None,
    digest: str,
    labels: Mapping[str, str],
) -> Draft:
    """What the document allows or denies by name, before anything ran."""
    data = {
        "decisionId": decision_id,
        "action": "allow" if allowed else "deny",
        "sniHost": host,
        "policyDigest": digest,
        "reasonCode": reason_code,
        **present(ruleRef=rule),
    }
    return Draft(L7_EGRESS_DECISION, {**about(run), **data, **labels})


def container_security(
    run: RunIdentity, *, capabilities: Mapping[str, str], privileged: bool, no_new_privs: bool, seccomp_mode: int
) -> Draft:
    """What the kernel says of a process in the cell. `capabilities`: capEff, capPrm, capBnd, capAmb, capInh, 16 hex digits each."""
    measured = {**capabilities, "privileged": privileged, "noNewPrivs": no_new_privs, "seccompMode": seccomp_mode}
    return Draft(CONTAINER_SECURITY, {"cellId": run.cell_id, "runId": run.run_id, **measured})


def network_policy(run: RunIdentity, rules: Sequence[EgressRule]) -> Draft:
    """The cell has a network of its own; these destinations are declared."""
    declared = [
        {"host": rule.host, "port": rule.port, "protocol": rule.protocol, **present(dnsEgressJustification=rule.dns_egress_justification)}
        for rule in rules
    ]
    return Draft(
        NETWORK_POLICY,
        {**about(run), "isolationMode": NEW_NETWORK, "declaredEgressCount": len(rules), "declaredEgress": declared},
    )


def network_enforcement(run: RunIdentity, *, rule_count: int, exit_code: int, spawn_error: str | None) -> Draft:
    """How the network of the cell was closed when the command had ended. No packet filter is loaded: there is no way out to filter."""
    data = {
        "isolationMode": NEW_NETWORK,
        "nftRulesApplied": False,
        "declaredEgressRuleCount": rule_count,
        "supplementaryEgressFilterActive": False,
        "commandExitCode": exit_code,
        **present(spawnError=spawn_error),
    }
    return Draft(NETWORK_ENFORCEMENT, {**about(run), **data})


def command_output(run: RunIdentity, *, stream: str, offset: int, content: Mapping[str, Any], truncated: bool) -> Draft:
    """A piece of what the command wrote. `content` is `text`, or `base64` where it is not UTF-8; `offset` counts bytes of the stream.

    `truncated`: there was more, and it is not recorded.
    """
    return Draft(COMMAND_OUTPUT, {**about(run), "stream": stream, "offset": offset, **content, **present(truncated=truncated or None)})


def identity_materialized(run: RunIdentity, identity: Identity) -> Draft:
    """The credential of the declared identity was had."""
    return Draft(IDENTITY_MATERIALIZED, {**about(run), "identity": _identity(identity)})


def identity_failed(run: RunIdentity, identity: Identity, *, operation: str, reason: str) -> Draft:
    """It could not be had (`materialize`) or given back (`revoke`)."""
    return Draft(IDENTITY_FAILED, {**about(run), "identity": _identity(identity), "operation": operation, "reason": reason})


def identity_revoked(run: RunIdentity, identity: Identity, *, provenance: str | None) -> Draft:
    """The cell that had it is gone, and with it every copy of ours."""
    return Draft(IDENTITY_REVOKED, {**about(run), "identity": _identity(identity), "reason": "teardown", **provenance_of(provenance)})


def universal_token(run: RunIdentity, *, role_root: str) -> Draft:
    """A derivation token that is bound to no run was let pass."""
    data = {
        "cellId": run.cell_id,
        "runId": run.run_id,
        "specId": run.spec_id,
        "specHash": run.spec_hash,
        "roleRoot": role_root,
        "reason": "universal token (parentRunId: null) accepted in permissive mode",
        "remediation": "bind tokens to a parent run, and unset CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS to leave permissive mode;"
        " a universal token can be used by any run of the role",
    }
    return Draft(UNIVERSAL_TOKEN, data)


def compliance_summary(run: RunIdentity, spec: CellSpec, *, limits_declared: bool, exit_code: int | None) -> Draft:
    """What an auditor asks of every run. `exit_code` is None where no command came to an end."""
    policy = spec.policy
    data: dict[str, Any] = {
        **about(run),
        "lifetimeTtlSeconds": spec.lifetime.ttl_seconds,
        "egressRuleCount": len(spec.authority.egress_rules or ()),
        "resourceLimitsPresent": limits_declared,
        "secretDeliveryMode": spec.run.secret_delivery if spec.run else "env",
        "exportTargetCount": len((spec.export and spec.export.targets) or ()),
        **present(
            policyPackId=policy and policy.pack_id,
            policyPackVersion=policy and policy.pack_version,
            policyBundleDigest=policy and policy.bundle_digest,
            placement=run.placement or None,
            commandExitCode=exit_code,
        ),
    }
    return Draft(COMPLIANCE_SUMMARY, data)


def homeostasis(run: RunIdentity, spec: CellSpec, *, digest: str, connections: int | None, fetched_secrets: frozenset[str] | None) -> Draft:
    """Declared authority beside what was used of it.

    `connections`: how many left the cell, None where nothing counts them. `fetched_secrets`: the keys that the command asked for, None
    where they were handed over without being asked for; those it never asked for are recommended for removal.
    """
    declared = len(spec.authority.egress_rules or ())
    refs = spec.authority.secret_refs or ()
    mounts = spec.authority.filesystem.mounts if spec.authority.filesystem else ()
    data: dict[str, Any] = {
        **about(run),
        "specHash": digest,
        "declaredEgressRules": declared,
        "exercisedEgressConnections": connections,
        "declaredSecretCount": len(refs),
        "declaredMountPaths": len(mounts),
        "authorityEfficiency": 1.0 if connections is None or not declared else min(connections / declared, 1.0),
        "recommendedRemovals": [],
    }
    if connections is None:
        data["exercisedEgressReason"] = NOT_COUNTED
    if mounts:
        data |= {"accessedMountPaths": None, "accessedMountReason": "nothing watches which files of a mount are read"}
    else:
        data["accessedMountPaths"] = 0
    if fetched_secrets is not None:
        data["exercisedSecretCount"] = sum(ref in fetched_secrets for ref in refs)
        data["recommendedRemovals"] = [{"kind": "secretRef", "name": ref} for ref in refs if ref not in fetched_secrets]
    return Draft(HOMEOSTASIS, data)


def policy_rejected(run: RunIdentity, spec: CellSpec, *, violations: Sequence[tuple[str, str]]) -> Draft:
    """The operator's policy pack refused the document: (rule, message) of each violation. No cell was made."""
    data = {
        "specId": run.spec_id,
        "violationCount": len(violations),
        "violations": [{"rule": rule, "message": message} for rule, message in violations],
        **present(
            policyPackId=spec.policy and spec.policy.pack_id,
            policyPackVersion=spec.policy and spec.policy.pack_version,
            correlation=run.correlation,
        ),
    }
    return Draft(POLICY_REJECTED, data)


def authz_rejected(run: RunIdentity, *, reason: str, message: str, pool_id: str | None, pack_id: str | None) -> Draft:
    """The operator's authorization policy refused the document. No cell was made."""
    data = {
        "specId": run.spec_id,
        "reason": reason,
        "message": message,
        **present(
            tenantId=run.tenant_id,
            subject=run.tenant_id,
            deniedPoolId=pool_id,
            deniedPolicyPackId=pack_id,
            correlation=run.correlation,
        ),
    }
    return Draft(AUTHZ_REJECTED, data)


def keyset_verified(*, keyset_id: str, payload_digest: str, signer_kid: str, verified_at: str) -> Draft:
    """The operator's trust keyset is signed by a key that we know."""
    data = {
        "schemaVersion": TRUST_SCHEMA,
        "keysetId": keyset_id,
        "payloadDigest": payload_digest,
        "verifiedSignerKid": signer_kid,
        "verifiedAt": verified_at,
    }
    return Draft(KEYSET_VERIFIED, data)


def keyset_verification_failed(*, attempted: str, reason: str, failed_at: str) -> Draft:
    """It is not, and the operator lets the run go on. `attempted` is the file's base name."""
    data = {"schemaVersion": TRUST_SCHEMA, "attemptedKeysetPath": attempted, "reason": reason, "failedAt": failed_at}
    return Draft(KEYSET_VERIFICATION_FAILED, data)


def _identity(identity: Identity) -> dict[str, Any]:
    return {
        "kind": identity.kind,
        "provider": identity.provider,
        "audience": identity.audience,
        "subject": identity.subject,
        "ttlSeconds": identity.ttl_seconds,
        "secretRef": identity.secret_ref,
    }
