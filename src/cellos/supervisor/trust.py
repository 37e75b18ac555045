"""What the operator's files say about documents: who may grant authority, which policies hold, which keyset is trusted.

Files are read once, when a host is opened. A file that cannot be used is an error that names its variable; none is ever skipped. The last
part of a path may be no symbolic link: who can write to the directory must not choose which file is trusted.
"""

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from msgspec import Struct

from cellos.core import observations
from cellos.core.documents import CellSpec, ExecutionCell
from cellos.core.documents.parse import Syntax, syntax_of
from cellos.core.events import Draft, RunIdentity
from cellos.core.ids import rfc3339
from cellos.errors import CellosError, ConfigError, InvalidSpec, SpecSyntaxError, os_error_text
from cellos.supervisor.config import Config

if TYPE_CHECKING:
    from cellos.core.policy import AuthorizationPolicy, Denial, PolicyPack

T = TypeVar("T")


class Trust(Struct, frozen=True, kw_only=True):
    """The operator's files, read."""

    authority_keys: Mapping[str, str] = {}
    pack: "PolicyPack | None" = None
    policy: "AuthorizationPolicy | None" = None
    notices: tuple[Draft, ...] = ()
    """Events about the trust keyset, which belong to no run."""


class Grant(Struct, frozen=True, kw_only=True):
    """What a verified token makes of a document."""

    document: ExecutionCell
    """Its authority is no more than the token grants."""
    derivation: dict[str, Any] | None = None
    universal_role: str | None = None


class Rejected(CellosError):
    """A policy refuses the document. `draft` is the event that says so."""

    code = "rejected"

    def __init__(self, text: str, draft: Draft) -> None:
        super().__init__(text)
        self.draft = draft


def check_document(spec: CellSpec, config: Config) -> None:
    """What the operator's variables ask of every document, before anything else is looked at. Raises ConfigError."""
    authority = spec.authority
    if config.require_derivation and authority.authority_derivation is None and (authority.egress_rules or authority.secret_refs):
        raise ConfigError(
            "CELLOS_REQUIRE_AUTHORITY_DERIVATION is set: spec declares authority (egressRules or secretRefs) without an "
            "authorityDerivation token — cryptographic authority proof is required"
        )
    if config.require_telemetry and spec.telemetry is None:
        raise ConfigError(
            "CELLOS_REQUIRE_TELEMETRY_DECLARED is set: spec.telemetry block is required — every admitted cell must declare its telemetry "
            "intent (channel, events, agent version) under hardened deployments"
        )
    namespace = spec.placement and spec.placement.kubernetes_namespace
    if config.namespace is not None and namespace is not None and namespace != config.namespace:
        raise ConfigError(
            f"CELLOS_K8S_NAMESPACE={config.namespace}: spec.placement.kubernetesNamespace={namespace} does not match — "
            f"refusing to admit cell {spec.id}"
        )


def load(config: Config, now_ns: Callable[[], int]) -> Trust:
    """Read what the configuration names. Raises ConfigError."""
    keys: Mapping[str, str] = {}
    pack = policy = None
    if (path := config.authority_keys) is not None:
        from cellos.core.derivation import read_authority_keys

        keys = _read("CELLOS_AUTHORITY_KEYS_PATH", "authority keys", path, lambda raw, _: read_authority_keys(raw), only_json=True)
    notices = tuple(_keyset(config, now_ns()))
    if (path := config.policy_pack) is not None:
        from cellos.core.policy import read_policy_pack

        def read_pack(raw: bytes, syntax: Syntax) -> "PolicyPack":
            return read_policy_pack(raw, allow_downgrade=config.allow_downgrade, syntax=syntax)

        pack = _read("CELLOS_POLICY_PACK_PATH", "policy pack", path, read_pack)
    if (path := config.authz_policy) is not None:
        from cellos.core.policy import read_authorization_policy

        def read_policy(raw: bytes, syntax: Syntax) -> "AuthorizationPolicy":
            return read_authorization_policy(raw, syntax=syntax)

        policy = _read("CELLOS_AUTHZ_POLICY_PATH", "authorization policy", path, read_policy)
    return Trust(authority_keys=keys, pack=pack, policy=policy, notices=notices)


def grant(document: ExecutionCell, config: Config, trust: Trust, warn: Callable[[str], None]) -> Grant:
    """Verify the document's derivation token, if it has one: the run gets what the token grants. Raises InvalidSpec."""
    token = document.spec.authority.authority_derivation
    if token is None:
        return Grant(document=document)
    from cellos.core import derivation

    try:
        derivation.verify_token(document.spec, trust.authority_keys)
    except InvalidSpec as error:
        if config.authority_keys is None and error.text.startswith("unknown role"):
            raise InvalidSpec(f"{error.text} (CELLOS_AUTHORITY_KEYS_PATH is not set, so none is known)", path=error.path) from error
        raise
    refusal = derivation.scope_refusal(token, permissive=not config.require_scoped)
    if refusal is not None:
        raise InvalidSpec(refusal, path="spec.authority.authorityDerivation.parentRunId")
    universal = derivation.is_universal(token)
    if universal:
        warn(
            f"universal token accepted in permissive mode (CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS): role {token.role_root}, "
            f"cell {document.spec.id}"
        )
    said: dict[str, Any] = {"derivationVerified": True, "roleRoot": token.role_root}
    if token.parent_run_id is not None:
        said["parentRunId"] = token.parent_run_id
    try:
        narrowed = derivation.effective(document)
    except InvalidSpec as error:
        raise InvalidSpec(
            f"authorityDerivation grants too little, its leafCapability is all that counts: {error.text}", path=error.path
        ) from error
    return Grant(document=narrowed, derivation=said, universal_role=token.role_root if universal else None)


def check_policies(run: RunIdentity, spec: CellSpec, config: Config, trust: Trust) -> None:
    """Hold the document against authorization policy and policy pack, in that order. Raises Rejected."""
    if trust.policy is not None:
        from cellos.core.policy import authorize

        denial = authorize(trust.policy, spec)
        if denial is not None:
            raise _denied(run, denial)
    if trust.pack is not None:
        from cellos.core.policy import caller_refusal, violations

        found = [(violation.rule, violation.message) for violation in violations(trust.pack, spec)]
        refusal = caller_refusal(trust.pack, config.caller, spec)
        if refusal is not None:
            found.append(("secretRefAllowlist", refusal))
        if found:
            listed = "; ".join(f"{rule}: {message}" for rule, message in found)
            text = f"cell spec rejected by policy pack '{trust.pack.spec.id}': {listed}"
            raise Rejected(text, observations.policy_rejected(run, spec, violations=found))


def count_cell(run: RunIdentity, trust: Trust, within_rate: Callable[[str, int], bool]) -> None:
    """Count a cell that nothing else refuses. `within_rate` says whether it is one too many in an hour. Raises Rejected."""
    if trust.policy is None or trust.policy.spec.max_cells_per_hour is None:
        return
    subject = run.tenant_id or ""
    if not within_rate(subject, trust.policy.spec.max_cells_per_hour):
        from cellos.core.policy import rate_denial

        raise _denied(run, rate_denial(trust.policy, subject))


def _denied(run: RunIdentity, denial: "Denial") -> Rejected:
    draft = observations.authz_rejected(run, reason=denial.reason, message=denial.message, pool_id=denial.pool_id, pack_id=denial.pack_id)
    return Rejected(f"cell spec rejected by authorization policy: {denial.message}", draft)


def bounded(granted: Grant, trust: Trust) -> Grant:
    """With the policy pack's maxima where the document declares no limit."""
    if trust.pack is None:
        return granted
    from msgspec.structs import replace

    from cellos.core import policy

    spec = policy.bounded(trust.pack, granted.document.spec)
    return granted if spec is granted.document.spec else replace(granted, document=replace(granted.document, spec=spec))


def _keyset(config: Config, now_ns: int) -> list[Draft]:
    """Verify the trust keyset; the event about it."""
    from_variable = config.keyset_variable
    if config.trust_keys is None and config.require_trust_keys:
        raise ConfigError("CELLOS_REQUIRE_TRUST_VERIFY_KEYS is set but CELLOS_TRUST_VERIFY_KEYS_PATH is unset")
    ring: Mapping[str, Any] = {}
    if config.trust_keys is not None:
        from cellos.supervisor.keyfiles import load_keyring

        try:
            ring = load_keyring(config.trust_keys, None).ed25519
        except CellosError as error:
            raise ConfigError(f"CELLOS_TRUST_VERIFY_KEYS_PATH: cannot load '{config.trust_keys}': {error}") from error
    if not config.keyset:
        if from_variable != "CELLOS_TRUST_KEYSET_CHAIN_PATH":
            return []
        return _unverified(config, "(empty chain)", f"{from_variable} set but parsed no envelope paths", now_ns)
    try:
        from cellos.core.evidence.keyset import read_envelope, verify_chain, verify_envelope

        envelopes = [_understood_envelope(path, read_envelope) for path in config.keyset]
        chained = from_variable == "CELLOS_TRUST_KEYSET_CHAIN_PATH"
        found = verify_chain(envelopes, ring, now_ns) if chained else verify_envelope(envelopes[0], ring, now_ns)
    except CellosError as error:
        return _unverified(config, os.path.basename(config.keyset[-1]), error.text, now_ns)
    verified = observations.keyset_verified(
        keyset_id=found.keyset_id, payload_digest=found.payload_digest, signer_kid=found.signer_kid, verified_at=rfc3339(now_ns)
    )
    return [verified]


def _unverified(config: Config, attempted: str, reason: str, now_ns: int) -> list[Draft]:
    if config.require_trust_keys:
        raise ConfigError(f"{config.keyset_variable}: verification failed under CELLOS_REQUIRE_TRUST_VERIFY_KEYS=1: {reason}")
    return [observations.keyset_verification_failed(attempted=attempted, reason=reason, failed_at=rfc3339(now_ns))]


def _understood_envelope(path: str, read: Callable[[bytes], T]) -> T:
    from cellos.supervisor.keyfiles import read_unlinked

    try:
        return read(read_unlinked(path))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {os_error_text(error)}") from error
    except CellosError as error:
        raise ConfigError(f"JSON parse error in {path}: {error.text}") from error


def _read(variable: str, what: str, path: str, understand: Callable[[bytes, Syntax], T], *, only_json: bool = False) -> T:
    """An operator's file, understood. Raises ConfigError."""
    from cellos.supervisor.keyfiles import read_unlinked

    syntax: Syntax = "json"
    try:
        raw = read_unlinked(path)
        syntax = "json" if only_json else syntax_of(path, raw)
        return understand(raw, syntax)
    except OSError as error:
        raise ConfigError(f"{variable}: cannot read '{path}': {os_error_text(error)}") from error
    except SpecSyntaxError as error:
        raise ConfigError(f"{variable}: {syntax.upper()} parse error in '{path}': {error.text}") from error
    except CellosError as error:
        raise ConfigError(f"{variable}: invalid {what} in '{path}': {error.text}") from error
