import json
from base64 import b64encode
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.derivation import (
    effective,
    is_universal,
    read_authority_keys,
    scope_refusal,
    signed_bytes,
    verify_token,
)
from cellos.core.documents import AuthorityDerivation, Capability, EgressRule, ExecutionCell, GrantorSignature, parse_execution_cell
from cellos.core.evidence import ed25519
from cellos.errors import InvalidSpec, SpecSyntaxError

ROLE = "role-e4-02"
RULE = {"host": "api.example.com", "port": 443, "protocol": "https"}
LEAF: dict[str, Any] = {"egressRules": [RULE], "secretRefs": ["api-key"]}
PUBLIC = "KeWDOpFaZCmk46eUhHXDOO9Dbrgr6JyS8FlwRAPbnVU="
SIGNATURE = "GYCFtUG0RYoz1xJ39vB61cVzWA342PMEFFX0k2aOsVENDPxyCUa7zS33UKyUq62lFxObyADtMWXfMiUK65hoAw=="
KEYS = {ROLE: PUBLIC}


def token(**members: Any) -> dict[str, Any]:
    return {
        "roleRoot": ROLE,
        "parentRunId": None,
        "leafCapability": LEAF,
        "grantorSignature": {"algorithm": "ed25519", "bytes": SIGNATURE},
        **members,
    }


def document(given: dict[str, Any] | None, *, egress: Any = (RULE,), secrets: Any = ("api-key",), **spec: Any) -> ExecutionCell:
    authority: dict[str, Any] = {"egressRules": list(egress), "secretRefs": list(secrets)}
    if given is not None:
        authority["authorityDerivation"] = given
    whole = {
        "apiVersion": "cellos.io/v1",
        "kind": "ExecutionCell",
        "spec": {"id": "cell", "authority": authority, "lifetime": {"ttlSeconds": 60}, **spec},
    }
    return parse_execution_cell(json.dumps(whole).encode())


def unparsed(given: dict[str, Any], *, egress: Any = (RULE,), secrets: Any = ("api-key",)) -> ExecutionCell:
    """A document whose token was not compared with its authority, as the rules of documents do."""
    whole = document(None, egress=egress, secrets=secrets)
    authority = msgspec.structs.replace(whole.spec.authority, authority_derivation=msgspec.convert(given, AuthorityDerivation))
    return msgspec.structs.replace(whole, spec=msgspec.structs.replace(whole.spec, authority=authority))


def read(given: dict[str, Any]) -> AuthorityDerivation:
    return msgspec.convert(given, AuthorityDerivation)


def refusal(given: dict[str, Any], keys: dict[str, str] = KEYS) -> str:
    with pytest.raises(InvalidSpec) as caught:
        verify_token(document(given).spec, keys)
    assert str(caught.value) == f"invalid cell specification: {caught.value.text}"
    return caught.value.text


CI_RULES = [
    *({"host": host, "port": 443, "protocol": "tls"} for host in ("api.github.com", "ghcr.io", "artifacts.internal")),
    {"host": "dns.internal", "port": 53, "protocol": "dns-acknowledged"},
]


class TestVectors:
    def test_signed_bytes(self) -> None:
        wire = signed_bytes(read(token()))
        assert wire == (
            b'{"leafCapability":{"egressRules":[{"host":"api.example.com","port":443,"protocol":"https"}],'
            b'"secretRefs":["api-key"]},"parentRunId":null,"roleRoot":"role-e4-02"}'
        )
        assert len(wire) == 161
        key = ed25519.private_key(b"\xa5" * 32)
        assert b64encode(key.public_key().public_bytes_raw()).decode() == PUBLIC
        assert b64encode(key.sign(wire)).decode() == SIGNATURE

    def test_it_holds(self) -> None:
        verify_token(document(token()).spec, KEYS)

    def test_the_other_key(self) -> None:
        public = ed25519.private_key(b"\x42" * 32).public_key().public_bytes_raw()
        assert b64encode(public).decode() == "IVL40Zt5HSRFMkLhXy6rbLfP+ntqXtMAl5YOBpiB2xI="
        assert refusal(token(), {ROLE: b64encode(public).decode()}) == "authority derivation signature invalid"


RULES = st.builds(
    EgressRule, host=st.text(), port=st.integers(0, 65535), protocol=st.none() | st.text(), dns_egress_justification=st.none() | st.text()
)
TOKENS = st.builds(
    AuthorityDerivation,
    role_root=st.text(),
    parent_run_id=st.none() | st.text(),
    leaf_capability=st.builds(Capability, egress_rules=st.lists(RULES, max_size=3).map(tuple), secret_refs=st.lists(st.text()).map(tuple)),
    grantor_signature=st.just(GrantorSignature(algorithm="", bytes="")),
)


class TestSignedBytes:
    @given(TOKENS)
    def test_they_are_sorted_compact_json(self, given: AuthorityDerivation) -> None:
        rules = []
        for rule in given.leaf_capability.egress_rules:
            members = {"host": rule.host, "port": rule.port, "protocol": rule.protocol}
            if rule.dns_egress_justification is not None:
                members["dnsEgressJustification"] = rule.dns_egress_justification
            rules.append(members)
        leaf = {"egressRules": rules, "secretRefs": list(given.leaf_capability.secret_refs)}
        whole = {"leafCapability": leaf, "parentRunId": given.parent_run_id, "roleRoot": given.role_root}
        assert signed_bytes(given) == json.dumps(whole, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()

    def test_absent_lists_are_empty_and_absent_members_null(self) -> None:
        given = token(leafCapability={"egressRules": [{"host": "h", "port": 1}]})
        del given["parentRunId"]
        assert signed_bytes(read(given)) == (
            b'{"leafCapability":{"egressRules":[{"host":"h","port":1,"protocol":null}],"secretRefs":[]},'
            b'"parentRunId":null,"roleRoot":"role-e4-02"}'
        )
        assert signed_bytes(read({**given, "leafCapability": {}})).startswith(b'{"leafCapability":{"egressRules":[],"secretRefs":[]},')

    def test_a_token_for_a_build(self) -> None:
        key = ed25519.private_key(b"\x42" * 32)
        rules = [*CI_RULES[:3], {**CI_RULES[3], "dnsEgressJustification": "resolves artifacts.internal"}]
        leaf = {"egressRules": rules, "secretRefs": ["NPM_TOKEN", "GITHUB_TOKEN"]}
        given = token(roleRoot="role-ci-runner", parentRunId="run-demo-ref-001", leafCapability=leaf)
        given["grantorSignature"]["bytes"] = b64encode(key.sign(signed_bytes(read(given)))).decode()
        spec = document(given, egress=leaf["egressRules"], secrets=leaf["secretRefs"]).spec
        verify_token(spec, {"role-ci-runner": b64encode(key.public_key().public_bytes_raw()).decode()})


class TestVerification:
    @pytest.mark.parametrize("keys", [{}, {"another": PUBLIC}])
    def test_unknown_role(self, keys: dict[str, str]) -> None:
        assert refusal(token(), keys) == "unknown role: role-e4-02"
        assert refusal(token(roleRoot="a\nb"), keys) == r'unknown role: "a\nb"'

    @pytest.mark.parametrize(
        ("key", "text"),
        [
            (PUBLIC[:-1], "is not valid base64: its length is 43 characters, not a multiple of four"),
            (f" {PUBLIC}", "is not valid base64: its length is 45 characters, not a multiple of four"),
            (PUBLIC.replace("K", "-"), "is not valid base64: character 1 is not in the alphabet"),
            (PUBLIC[:-2] + "V=", "is not valid base64: its last character has bits that belong to no byte"),
            ("AA==", "must be 32 bytes (got 1)"),
            ("", "must be 32 bytes (got 0)"),
            (b64encode(bytes(32)).decode(), "is not a valid ED25519 point: it has small order (4)"),
            (b64encode(b"\x02" + bytes(31)).decode(), "is not a valid ED25519 point: it is not a point of the curve"),
        ],
    )
    def test_the_key(self, key: str, text: str) -> None:
        assert refusal(token(), {ROLE: key}) == f"authority derivation verifying key for role {ROLE} {text}"

    @pytest.mark.parametrize(
        ("bytes_", "text"),
        [
            ("!", "authority derivation grantor signature is not valid base64: its length is 1 characters, not a multiple of four"),
            ("AA==", "authority derivation grantor signature must be 64 bytes (got 1)"),
            ("A" + SIGNATURE[1:], "authority derivation signature invalid"),
            (b64encode(bytes(64)).decode(), "authority derivation signature invalid"),
        ],
    )
    def test_the_signature(self, bytes_: str, text: str) -> None:
        assert refusal(token(grantorSignature={"algorithm": "ed25519", "bytes": bytes_})) == text

    @pytest.mark.parametrize(
        "change",
        [
            {"parentRunId": "run-1"},
            {"parentRunId": ""},
            {"leafCapability": {**LEAF, "secretRefs": []}},
            {"leafCapability": {**LEAF, "egressRules": []}},
            {"leafCapability": {**LEAF, "egressRules": [{**RULE, "host": "API.example.com"}]}},
            {"leafCapability": {**LEAF, "egressRules": [{**RULE, "dnsEgressJustification": ""}]}},
        ],
    )
    def test_everything_that_is_signed(self, change: dict[str, Any]) -> None:
        assert refusal(token(**change)) == "authority derivation signature invalid"

    @given(st.lists(st.tuples(st.sampled_from([{}, LEAF]), st.sampled_from([{}, LEAF])), max_size=3), st.text(max_size=9))
    def test_nothing_else_matters(self, steps: list[tuple[dict[str, Any], dict[str, Any]]], algorithm: str) -> None:
        plain, given = document(token()), token(grantorSignature={"algorithm": algorithm, "bytes": SIGNATURE})
        given["derivationSteps"] = [{"fromCapability": one, "toCapability": other} for one, other in steps]
        changed = document(given)
        verify_token(changed.spec, KEYS)
        assert signed_bytes(read(given)) == signed_bytes(read(token()))
        before, after = effective(plain).spec.authority, effective(changed).spec.authority
        assert (before.egress_rules, before.secret_refs) == (after.egress_rules, after.secret_refs)

    @pytest.mark.parametrize(
        ("declared", "member"),
        [({"egress": ()}, "egressRules"), ({"secrets": ("a", "b")}, "secretRefs"), ({"egress": (), "secrets": ()}, "egressRules")],
    )
    def test_the_leaf_comes_first(self, declared: dict[str, Any], member: str) -> None:
        with pytest.raises(InvalidSpec) as caught:
            verify_token(unparsed(token(), **declared).spec, {})
        assert caught.value.text == (
            "spec.authorityDerivation.leafCapability exceeds spec.authority — child authority must be ⊆ declared authority"
        )
        assert caught.value.path == f"spec.authority.authorityDerivation.leafCapability.{member}"

    def test_no_token(self) -> None:
        verify_token(document(None).spec, {})


class TestScope:
    @pytest.mark.parametrize("permissive", [False, True])
    @pytest.mark.parametrize("parent", ["run-1", ""])
    def test_a_token_of_a_run(self, parent: str, *, permissive: bool) -> None:
        given = read(token(parentRunId=parent))
        assert not is_universal(given)
        assert scope_refusal(given, permissive=permissive) is None

    def test_a_universal_token(self) -> None:
        given = read(token())
        assert is_universal(given)
        assert scope_refusal(given, permissive=True) is None
        assert scope_refusal(given, permissive=False) == (
            "authority derivation token has parentRunId: null — universal tokens are rejected by the strict-by-default policy "
            "(set CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS to 0/false/no/off to opt into permissive mode, "
            "which emits an audit warning event instead)"
        )


class TestEffective:
    def test_the_leaf_is_all_that_a_run_gets(self) -> None:
        more = {"host": "other.example.com", "port": 443, "protocol": "https"}
        given = document(token(), egress=[more, RULE], secrets=["other", "api-key"])
        authority = effective(given).spec.authority
        assert authority.egress_rules == read(token()).leaf_capability.egress_rules
        assert authority.secret_refs == ("api-key",)
        assert msgspec.structs.replace(authority, egress_rules=None, secret_refs=None) == msgspec.structs.replace(
            given.spec.authority, egress_rules=None, secret_refs=None
        )

    def test_an_empty_leaf_is_nothing(self) -> None:
        authority = effective(document(token(leafCapability={}))).spec.authority
        assert (authority.egress_rules, authority.secret_refs) == ((), ())

    def test_without_a_token(self) -> None:
        given = document(None)
        assert effective(given) is given

    def test_what_needs_more_than_the_leaf_is_refused(self) -> None:
        target = {"kind": "http", "name": "store", "baseUrl": "https://api.example.com", "secretRef": "other"}
        given = document(token(), secrets=["api-key", "other"], export={"targets": [target]})
        with pytest.raises(InvalidSpec, match=r"secretRef \"other\" must appear in authority\.secretRefs"):
            effective(given)


class TestKeysFile:
    def test_roles(self) -> None:
        assert read_authority_keys(json.dumps(KEYS).encode()) == KEYS
        assert read_authority_keys(b"{}") == {}

    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            (b"{", "line 1 column 2: the document ends too early"),
            (b"[]", "the document must be an object, role -> base64 of a public key, given a list"),
            (b'{"a": 1}', 'role "a" must have the base64 of a public key, given the integer 1'),
            (b'{"a": "x", "\\u0061": "y"}', "a is given more than once"),
        ],
    )
    def test_refused(self, raw: bytes, text: str) -> None:
        with pytest.raises(SpecSyntaxError) as caught:
            read_authority_keys(raw)
        assert caught.value.text == text
