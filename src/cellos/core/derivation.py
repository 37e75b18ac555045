"""Derivation tokens: a role's signed grant, which becomes all that a run may reach and know.

Signed are the leaf, the id of the parent run and the role, as compact JSON with sorted members (`signed_bytes`); nothing else of a token
is. `derivationSteps` and the name of the algorithm are therefore read by nobody. A token has no end and names no run of its own: the only
thing that binds it is `parentRunId`, which is why one without it is refused unless the operator allows it (`scope_refusal`).
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from cellos.core.authority import capability_excess, capability_of
from cellos.core.documents import AuthorityDerivation, CellSpec, EgressRule, ExecutionCell, strict, validate
from cellos.core.documents.wording import given, quoted
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import Base64Error, decode_standard
from cellos.errors import InvalidSpec, SpecSyntaxError

EXCEEDS = "spec.authorityDerivation.leafCapability exceeds spec.authority — child authority must be ⊆ declared authority"
UNIVERSAL = (
    "authority derivation token has parentRunId: null — universal tokens are rejected by the strict-by-default policy (set "
    "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS to 0/false/no/off to opt into permissive mode, which emits an audit warning event instead)"
)
_PATH = "spec.authority.authorityDerivation"
_ENCODER = msgspec.json.Encoder(order="deterministic")


def read_authority_keys(raw: bytes) -> dict[str, str]:
    """The keys file: role to public key, in standard base64. Keys are looked at when one is used. Raises SpecSyntaxError."""
    value = strict.decode(raw)
    if not isinstance(value, dict):
        raise SpecSyntaxError(f"the document must be an object, role -> base64 of a public key, given {given(value)}")
    keys = {}
    for role, key in value.items():
        if not isinstance(key, str):
            raise SpecSyntaxError(f"role {quoted(role)} must have the base64 of a public key, given {given(key)}")
        keys[role] = key
    return keys


def verify_token(spec: CellSpec, keys: Mapping[str, str]) -> None:
    """Check the token of a document, if there is one. Raises InvalidSpec."""
    token = spec.authority.authority_derivation
    if token is None:
        return
    if (excess := capability_excess(token.leaf_capability, capability_of(spec.authority))) is not None:
        raise InvalidSpec(EXCEEDS, path=f"{_PATH}.leafCapability.{excess.field}")
    _verify_signature(token, keys)


def is_universal(token: AuthorityDerivation) -> bool:
    """Whether the token belongs to no run. An empty id is one."""
    return token.parent_run_id is None


def scope_refusal(token: AuthorityDerivation, *, permissive: bool) -> str | None:
    """Why a token that is otherwise valid is not accepted. `permissive` lets a universal one through."""
    return UNIVERSAL if is_universal(token) and not permissive else None


def effective(document: ExecutionCell) -> ExecutionCell:
    """The document with what the leaf grants for its egress rules and secrets; unchanged without a token.

    Raises InvalidSpec where what is left breaks a rule, such as an export whose secret the leaf does not grant. Verify the token first.
    """
    authority = document.spec.authority
    if authority.authority_derivation is None:
        return document
    leaf = authority.authority_derivation.leaf_capability
    narrowed = msgspec.structs.replace(authority, egress_rules=leaf.egress_rules, secret_refs=leaf.secret_refs)
    result = msgspec.structs.replace(document, spec=msgspec.structs.replace(document.spec, authority=narrowed))
    validate(result)
    return result


def signed_bytes(token: AuthorityDerivation) -> bytes:
    """What the role has signed."""
    leaf = {
        "egressRules": [_rule(rule) for rule in token.leaf_capability.egress_rules],
        "secretRefs": token.leaf_capability.secret_refs,
    }
    return _ENCODER.encode({"leafCapability": leaf, "parentRunId": token.parent_run_id, "roleRoot": token.role_root})


def _rule(rule: EgressRule) -> dict[str, object]:
    members: dict[str, object] = {"host": rule.host, "port": rule.port, "protocol": rule.protocol}
    if rule.dns_egress_justification is not None:
        members["dnsEgressJustification"] = rule.dns_egress_justification
    return members


def _verify_signature(token: AuthorityDerivation, keys: Mapping[str, str]) -> None:
    role = token.role_root
    text = keys.get(role)
    if text is None:
        raise InvalidSpec(f"unknown role: {_plain(role)}", path=f"{_PATH}.roleRoot")
    whose = f"authority derivation verifying key for role {_plain(role)}"
    raw = _decoded(text, whose, f"{_PATH}.roleRoot")
    if len(raw) != ed25519.KEY_BYTES:
        raise InvalidSpec(f"{whose} must be {ed25519.KEY_BYTES} bytes (got {len(raw)})", path=f"{_PATH}.roleRoot")
    try:
        key = ed25519.public_key(raw)
    except ed25519.KeyRefusedError as error:
        raise InvalidSpec(f"{whose} is not a valid ED25519 point: {error}", path=f"{_PATH}.roleRoot") from None
    path = f"{_PATH}.grantorSignature.bytes"
    signature = _decoded(token.grantor_signature.bytes, "authority derivation grantor signature", path)
    if len(signature) != ed25519.SIGNATURE_BYTES:
        text = f"authority derivation grantor signature must be {ed25519.SIGNATURE_BYTES} bytes (got {len(signature)})"
        raise InvalidSpec(text, path=path)
    if ed25519.signature_fault(key, signature, signed_bytes(token)) is not None:
        raise InvalidSpec("authority derivation signature invalid", path=path)


def _decoded(text: str, what: str, path: str) -> bytes:
    try:
        return decode_standard(text)
    except Base64Error as error:
        raise InvalidSpec(f"{what} is not valid base64: {error}", path=path) from None


def _plain(role: str) -> str:
    """A role as the texts show it: without quotes, but always on one line."""
    return role if role.isprintable() and len(role) <= 300 else quoted(role)
