from __future__ import annotations

import json
import os
from base64 import b64encode
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from cellos.core.derivation import signed_bytes
from cellos.core.documents import ExecutionCell, parse_execution_cell
from cellos.core.evidence import ed25519
from cellos.core.evidence.base64 import encode_url
from cellos.core.evidence.keyset import PAYLOAD_TYPE
from cellos.core.ids import unix_ns
from cellos.errors import ConfigError, InvalidSpec
from cellos.supervisor.compose import run_identity
from cellos.supervisor.config import Config, read_config
from cellos.supervisor.trust import Grant, Rejected, Trust, bounded, check_document, check_policies, count_cell, grant, load

NOW = unix_ns("2026-06-01T12:00:00Z")
ROLE_KEY = ed25519.private_key(b"\xa5" * 32)
OTHER_KEY = ed25519.private_key(b"\x42" * 32)
RULE = {"host": "api.example.com", "port": 443, "protocol": "https"}
OTHER_RULE = {"host": "other.example.com", "port": 443, "protocol": "https"}


def document(**spec: Any) -> ExecutionCell:
    body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, **spec}
    return parse_execution_cell(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}).encode())


def public(key: Any) -> bytes:
    raw: bytes = key.public_key().public_bytes_raw()
    return raw


class Files:
    """The operator's files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, name: str, content: object) -> str:
        path = self.path / name
        path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())
        return str(path)

    def load(self, **variables: str) -> Trust:
        return load(read_config(variables), lambda: NOW)

    def refused(self, **variables: str) -> str:
        with pytest.raises(ConfigError) as caught:
            self.load(**variables)
        return str(caught.value)


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return Files(tmp_path)


PACK = {"apiVersion": "cellos.io/v1", "kind": "PolicyPack", "spec": {"id": "strict", "rules": {"maxLifetimeTtlSeconds": 30}}}
POLICY = {"apiVersion": "cellos.io/v1", "kind": "AuthorizationPolicy", "spec": {"subjects": ["acme"], "allowedPools": ["p"]}}
KEYS = {"ci": b64encode(public(ROLE_KEY)).decode()}
FILES = {
    "CELLOS_AUTHORITY_KEYS_PATH": ("authority keys", KEYS),
    "CELLOS_POLICY_PACK_PATH": ("policy pack", PACK),
    "CELLOS_AUTHZ_POLICY_PATH": ("authorization policy", POLICY),
}
each_file = pytest.mark.parametrize(("variable", "what", "content"), [(name, *row) for name, row in FILES.items()], ids=list(FILES))


class TestFiles:
    def test_nothing_is_read_where_nothing_is_named(self, files: Files) -> None:
        assert files.load() == Trust()

    @each_file
    def test_one_that_can_be_used(self, files: Files, variable: str, what: str, content: object) -> None:
        assert files.load(**{variable: files.write("file.json", content)}) != Trust()

    @each_file
    def test_one_that_is_missing(self, files: Files, variable: str, what: str, content: object) -> None:
        path = str(files.path / "none.json")
        assert files.refused(**{variable: path}) == f"{variable}: cannot read '{path}': No such file or directory (os error 2)"

    @each_file
    def test_a_link_is_refused_however_good_the_file(self, files: Files, variable: str, what: str, content: object) -> None:
        files.write("file.json", content)
        (files.path / "link.json").symlink_to("file.json")
        path = str(files.path / "link.json")
        assert files.refused(**{variable: path}) == f"{variable}: cannot read '{path}': Too many levels of symbolic links (os error 40)"

    @each_file
    def test_a_link_to_a_directory_on_the_way_is_the_operators_matter(
        self, files: Files, variable: str, what: str, content: object
    ) -> None:
        files.write("file.json", content)
        (files.path / "place").symlink_to(".")
        assert files.load(**{variable: str(files.path / "place" / "file.json")}) != Trust()

    @each_file
    def test_one_that_is_no_json(self, files: Files, variable: str, what: str, content: object) -> None:
        path = files.write("file.json", b"{nonsense")
        assert files.refused(**{variable: path}).startswith(f"{variable}: JSON parse error in '{path}': line 1 column 2: ")

    @each_file
    @pytest.mark.parametrize("name", ["README.md", "file.yaml"])
    def test_the_words_are_those_of_the_syntax_that_was_tried(
        self, files: Files, variable: str, what: str, content: object, name: str
    ) -> None:
        path = files.write(name, b"a: [")
        tried = "JSON" if what == "authority keys" else "YAML"
        assert files.refused(**{variable: path}).startswith(f"{variable}: {tried} parse error in '{path}': line ")

    @each_file
    def test_one_that_is_something_else(self, files: Files, variable: str, what: str, content: object) -> None:
        """A map of roles has no kind: what is no map of texts is no JSON of that form."""
        wrong: object = {"ci": 1} if what == "authority keys" else {**PACK, "kind": "Else"}
        path = files.write("file.json", wrong)
        how = "JSON parse error" if what == "authority keys" else f"invalid {what}"
        assert files.refused(**{variable: path}).startswith(f"{variable}: {how} in '{path}': ")

    @each_file
    @pytest.mark.parametrize("held_open", [False, True])
    def test_a_pipe_does_not_make_us_wait(self, files: Files, variable: str, what: str, content: object, held_open: bool) -> None:
        path = files.path / "pipe.json"
        os.mkfifo(path)
        writer = os.open(path, os.O_RDWR) if held_open else -1
        try:
            assert f"in '{path}': " in files.refused(**{variable: str(path)})
        finally:
            if held_open:
                os.close(writer)

    @each_file
    def test_a_directory_is_no_file(self, files: Files, variable: str, what: str, content: object) -> None:
        assert files.refused(**{variable: str(files.path)}) == f"{variable}: cannot read '{files.path}': Is a directory (os error 21)"

    @each_file
    def test_one_without_end(self, files: Files, variable: str, what: str, content: object) -> None:
        assert "/dev/zero" in files.refused(**{variable: "/dev/zero"})

    @pytest.mark.parametrize("variable", ["CELLOS_POLICY_PACK_PATH", "CELLOS_AUTHZ_POLICY_PATH"])
    def test_yaml_is_read_too(self, files: Files, variable: str) -> None:
        content = {"CELLOS_POLICY_PACK_PATH": PACK, "CELLOS_AUTHZ_POLICY_PATH": POLICY}[variable]
        assert files.load(**{variable: files.write("file.yaml", content)}) == files.load(**{variable: files.write("file.json", content)})

    def test_an_old_pack_has_to_be_asked_for(self, files: Files) -> None:
        spec = {"id": "old", "version": "0.9.0", "rules": {}}
        path = files.write("pack.json", {**PACK, "spec": spec})
        assert files.refused(CELLOS_POLICY_PACK_PATH=path) == (
            f"CELLOS_POLICY_PACK_PATH: invalid policy pack in '{path}': policy pack spec.version 0.9.0 is older than "
            "runtime-supported floor 1.0.0 (set CELLOS_POLICY_ALLOW_DOWNGRADE=1 to override)"
        )
        assert files.load(CELLOS_POLICY_PACK_PATH=path, CELLOS_POLICY_ALLOW_DOWNGRADE="1").pack is not None


# ---------------------------------------------------------------- the trust keyset

PAYLOAD = b'{"keysetId": "set-1", "keys": []}'
DIGEST = f"sha256:{sha256(PAYLOAD).hexdigest()}"
RING = {"a": encode_url(public(ROLE_KEY))}
REQUIRED = {"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "1"}
UNSIGNED = "signed trust keyset envelope: no signature verified"


def envelope(payload: bytes = PAYLOAD, *, key: Any = ROLE_KEY, **members: Any) -> dict[str, Any]:
    return {
        "schemaVersion": "1.0.0",
        "payloadType": PAYLOAD_TYPE,
        "payload": encode_url(payload),
        "signatures": [{"signerKid": "a", "algorithm": "ed25519", "signature": encode_url(key.sign(payload))}],
        "payloadDigest": f"sha256:{sha256(payload).hexdigest()}",
        "producedAt": "2026-01-01T00:00:00Z",
        **members,
    }


class TestKeyset:
    @pytest.fixture
    def ring(self, files: Files) -> dict[str, str]:
        """The variable of the keys."""
        return {"CELLOS_TRUST_VERIFY_KEYS_PATH": files.write("ring.json", RING)}

    def failed(self, files: Files, reason: str, attempted: str, **variables: str) -> None:
        """It is an event where nobody requires more, else the end."""
        [draft] = files.load(**variables).notices
        assert draft.type.endswith("trust.v1.keyset_verification_failed")
        assert draft.data == {
            "schemaVersion": "1.0.0",
            "attemptedKeysetPath": attempted,
            "reason": reason,
            "failedAt": "2026-06-01T12:00:00.000000000+00:00",
        }
        chain = "CELLOS_TRUST_KEYSET_CHAIN_PATH"
        name = chain if chain in variables else "CELLOS_TRUST_KEYSET_PATH"
        keys = {"CELLOS_TRUST_VERIFY_KEYS_PATH": files.write("ring.json", RING)}
        text = files.refused(**REQUIRED, **{**keys, **variables})
        assert text == f"{name}: verification failed under CELLOS_REQUIRE_TRUST_VERIFY_KEYS=1: {reason}"

    @pytest.mark.parametrize("required", [{}, REQUIRED])
    def test_one_that_holds(self, files: Files, ring: dict[str, str], required: dict[str, str]) -> None:
        [draft] = files.load(CELLOS_TRUST_KEYSET_PATH=files.write("set.json", envelope()), **ring, **required).notices
        assert draft.type.endswith("trust.v1.keyset_verified")
        assert draft.data == {
            "schemaVersion": "1.0.0",
            "keysetId": "set-1",
            "payloadDigest": DIGEST,
            "verifiedSignerKid": "a",
            "verifiedAt": "2026-06-01T12:00:00.000000000+00:00",
        }

    def test_without_one_there_is_nothing_to_say(self, files: Files, ring: dict[str, str]) -> None:
        assert files.load(**ring).notices == ()
        assert files.load(**ring, **REQUIRED).notices == ()

    def test_signed_by_somebody_else(self, files: Files, ring: dict[str, str]) -> None:
        path = files.write("set.json", envelope(key=OTHER_KEY))
        self.failed(files, UNSIGNED, "set.json", CELLOS_TRUST_KEYSET_PATH=path, **ring)

    def test_without_keys_nobody_is_known(self, files: Files) -> None:
        [draft] = files.load(CELLOS_TRUST_KEYSET_PATH=files.write("set.json", envelope())).notices
        assert draft.data["reason"] == UNSIGNED

    def test_required_without_keys(self, files: Files) -> None:
        assert files.refused(**REQUIRED) == "CELLOS_REQUIRE_TRUST_VERIFY_KEYS is set but CELLOS_TRUST_VERIFY_KEYS_PATH is unset"

    def test_one_that_is_missing(self, files: Files, ring: dict[str, str]) -> None:
        path = str(files.path / "none.json")
        reason = f"cannot read {path}: No such file or directory (os error 2)"
        self.failed(files, reason, "none.json", CELLOS_TRUST_KEYSET_PATH=path, **ring)

    def test_a_link(self, files: Files, ring: dict[str, str]) -> None:
        files.write("set.json", envelope())
        (files.path / "link.json").symlink_to("set.json")
        path = str(files.path / "link.json")
        reason = f"cannot read {path}: Too many levels of symbolic links (os error 40)"
        self.failed(files, reason, "link.json", CELLOS_TRUST_KEYSET_PATH=path, **ring)

    def test_one_that_is_no_json(self, files: Files, ring: dict[str, str]) -> None:
        path = files.write("set.json", b"{")
        [draft] = files.load(CELLOS_TRUST_KEYSET_PATH=path, **ring).notices
        assert draft.data["reason"].startswith(f"JSON parse error in {path}: ")
        self.failed(files, draft.data["reason"], "set.json", CELLOS_TRUST_KEYSET_PATH=path, **ring)

    def test_a_pipe(self, files: Files, ring: dict[str, str]) -> None:
        os.mkfifo(files.path / "pipe")
        [draft] = files.load(CELLOS_TRUST_KEYSET_PATH=str(files.path / "pipe"), **ring).notices
        assert "JSON parse error" in draft.data["reason"]

    def test_a_chain_is_told_by_its_last(self, files: Files, ring: dict[str, str]) -> None:
        second = b'{"keysetId": "set-2"}'
        paths = [files.write("1.json", envelope()), files.write("2.json", envelope(second, replacesEnvelopeDigest=DIGEST))]
        # It wins over the single one, which is not even looked at.
        single = {"CELLOS_TRUST_KEYSET_PATH": "/nowhere"}
        [draft] = files.load(CELLOS_TRUST_KEYSET_CHAIN_PATH="\n".join(paths), **ring, **single).notices
        assert draft.data["keysetId"] == "set-2"

    def test_a_chain_with_a_wrong_link(self, files: Files, ring: dict[str, str]) -> None:
        wrong = "sha256:" + "0" * 64
        paths = [files.write("1.json", envelope()), files.write("2.json", envelope(b"{}", replacesEnvelopeDigest=wrong))]
        reason = f"signed trust keyset chain: envelope at index 1 replacesEnvelopeDigest mismatch: declared={wrong}, expected={DIGEST}"
        self.failed(files, reason, "2.json", CELLOS_TRUST_KEYSET_CHAIN_PATH=",".join(paths), **ring)

    def test_a_chain_of_nothing(self, files: Files, ring: dict[str, str]) -> None:
        reason = "CELLOS_TRUST_KEYSET_CHAIN_PATH set but parsed no envelope paths"
        self.failed(files, reason, "(empty chain)", CELLOS_TRUST_KEYSET_CHAIN_PATH=" , \n", **ring)

    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (lambda path: None, "trust verify keys: cannot open {}: No such file or directory (os error 2)"),
            (
                lambda path: path.write_text("[]"),
                "trust verify keys: top-level value must be a JSON object mapping kid -> base64url-pubkey",
            ),
            (lambda path: path.write_text('{"k": "AA"}'), 'trust verify keys: kid "k" decoded to 1 bytes, expected 32'),
        ],
    )
    def test_keys_that_cannot_be_used_are_always_the_end(self, files: Files, make: Callable[[Path], object], text: str) -> None:
        path = files.path / "keys.json"
        make(path)
        expected = f"CELLOS_TRUST_VERIFY_KEYS_PATH: cannot load '{path}': {text.format(path)}"
        assert files.refused(CELLOS_TRUST_VERIFY_KEYS_PATH=str(path)) == expected

    def test_a_link_to_keys(self, files: Files) -> None:
        files.write("ring.json", RING)
        (files.path / "link.json").symlink_to("ring.json")
        path = str(files.path / "link.json")
        text = f"CELLOS_TRUST_VERIFY_KEYS_PATH: cannot load '{path}': trust verify keys: cannot open {path}: "
        assert files.refused(CELLOS_TRUST_VERIFY_KEYS_PATH=path).startswith(text)


# ---------------------------------------------------------------- what is asked of documents


def token(
    parent: str | None = "run-0", *, key: Any = ROLE_KEY, role: str = "ci", rules: Any = (RULE,), secrets: Any = ("A",)
) -> dict[str, Any]:
    made = {
        "roleRoot": role,
        "parentRunId": parent,
        "leafCapability": {"egressRules": list(rules), "secretRefs": list(secrets)},
        "grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="},
    }
    authority = {"egressRules": [RULE, OTHER_RULE], "secretRefs": ["A", "B"], "authorityDerivation": made}
    parsed = document(authority=authority).spec.authority.authority_derivation
    assert parsed is not None
    made["grantorSignature"] = {"algorithm": "ed25519", "bytes": b64encode(key.sign(signed_bytes(parsed))).decode()}
    return made


def with_token(made: dict[str, Any], **spec: Any) -> ExecutionCell:
    return document(authority={"egressRules": [RULE, OTHER_RULE], "secretRefs": ["A", "B"], "authorityDerivation": made}, **spec)


DERIVATION = (
    "CELLOS_REQUIRE_AUTHORITY_DERIVATION is set: spec declares authority (egressRules or secretRefs) without an "
    "authorityDerivation token — cryptographic authority proof is required"
)
TELEMETRY = (
    "CELLOS_REQUIRE_TELEMETRY_DECLARED is set: spec.telemetry block is required — every admitted cell must declare its telemetry "
    "intent (channel, events, agent version) under hardened deployments"
)


class TestDocuments:
    def refused(self, of: ExecutionCell, **config: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            check_document(of.spec, Config(**config))
        return str(caught.value)

    @pytest.mark.parametrize("authority", [{"egressRules": [RULE]}, {"secretRefs": ["A"]}])
    def test_authority_without_a_token(self, authority: dict[str, Any]) -> None:
        of = document(authority=authority)
        assert self.refused(of, require_derivation=True) == DERIVATION
        check_document(of.spec, Config())

    def test_no_authority_needs_none(self) -> None:
        check_document(document(authority={"egressRules": [], "secretRefs": []}).spec, Config(require_derivation=True))

    def test_with_a_token_it_is_for_later_to_say(self) -> None:
        check_document(with_token(token()).spec, Config(require_derivation=True))

    def test_telemetry(self) -> None:
        assert self.refused(document(), require_telemetry=True) == TELEMETRY

    def test_the_token_is_asked_for_first(self) -> None:
        assert self.refused(document(authority={"secretRefs": ["A"]}), require_derivation=True, require_telemetry=True) == DERIVATION

    @pytest.mark.parametrize("placement", [None, {"poolId": "p"}, {"kubernetesNamespace": "mine"}])
    def test_a_namespace_that_fits(self, placement: dict[str, Any] | None) -> None:
        check_document(document(placement=placement).spec, Config(namespace="mine"))

    def test_one_that_does_not(self) -> None:
        of = document(placement={"kubernetesNamespace": "yours"})
        assert self.refused(of, namespace="mine") == (
            "CELLOS_K8S_NAMESPACE=mine: spec.placement.kubernetesNamespace=yours does not match — refusing to admit cell cell-1"
        )
        check_document(of.spec, Config())


UNIVERSAL = (
    "authority derivation token has parentRunId: null — universal tokens are rejected by the strict-by-default policy (set "
    "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS to 0/false/no/off to opt into permissive mode, which emits an audit warning event instead)"
)


class TestTokens:
    def granted(self, of: ExecutionCell, warnings: list[str] | None = None, **config: Any) -> Grant:
        config.setdefault("authority_keys", "/keys")
        return grant(of, Config(**config), Trust(authority_keys=KEYS), (warnings if warnings is not None else []).append)

    def refused(self, of: ExecutionCell, keys: dict[str, str] = KEYS, **config: Any) -> str:
        config.setdefault("authority_keys", "/keys")
        with pytest.raises(InvalidSpec) as caught:
            grant(of, Config(**config), Trust(authority_keys=keys), lambda _: None)
        return caught.value.text

    def test_none_grants_what_the_document_declares(self) -> None:
        of = document(authority={"secretRefs": ["A"]})
        assert self.granted(of) == Grant(document=of)

    def test_one_grants_its_leaf(self) -> None:
        granted = self.granted(with_token(token()))
        authority = granted.document.spec.authority
        assert [rule.host for rule in authority.egress_rules or ()] == ["api.example.com"]
        assert authority.secret_refs == ("A",)
        assert granted.derivation == {"derivationVerified": True, "roleRoot": "ci", "parentRunId": "run-0"}
        assert granted.universal_role is None

    def test_a_universal_one_is_refused(self) -> None:
        assert self.refused(with_token(token(None))) == UNIVERSAL

    def test_unless_the_operator_is_permissive(self) -> None:
        warnings: list[str] = []
        granted = self.granted(with_token(token(None)), warnings, require_scoped=False)
        assert granted.universal_role == "ci"
        assert granted.derivation == {"derivationVerified": True, "roleRoot": "ci"}
        assert warnings == ["universal token accepted in permissive mode (CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS): role ci, cell cell-1"]

    def test_signed_by_somebody_else(self) -> None:
        assert self.refused(with_token(token(key=OTHER_KEY))) == "authority derivation signature invalid"

    def test_a_forged_universal_one_is_told_as_forged(self) -> None:
        assert self.refused(with_token(token(None, key=OTHER_KEY))) == "authority derivation signature invalid"

    def test_a_role_that_nobody_knows(self) -> None:
        assert self.refused(with_token(token(role="x"))) == "unknown role: x"

    def test_without_keys_that_is_why(self) -> None:
        text = "unknown role: ci (CELLOS_AUTHORITY_KEYS_PATH is not set, so none is known)"
        assert self.refused(with_token(token()), {}, authority_keys=None) == text


def run_of(of: ExecutionCell) -> Any:
    return run_identity(of.spec, "0" * 64, "run-1")


class TestPolicies:
    @pytest.fixture
    def trust(self, files: Files) -> Callable[..., Trust]:
        def make(*, rules: dict[str, Any] | None = None, policy: dict[str, Any] | None = None) -> Trust:
            variables = {}
            if rules is not None:
                pack = {**PACK, "spec": {"id": "strict", "rules": rules}}
                variables["CELLOS_POLICY_PACK_PATH"] = files.write("pack.json", pack)
            if policy is not None:
                variables["CELLOS_AUTHZ_POLICY_PATH"] = files.write("policy.json", {**POLICY, "spec": policy})
            return files.load(**variables)

        return make

    def rejected(self, of: ExecutionCell, by: Trust, **config: Any) -> Rejected:
        with pytest.raises(Rejected) as caught:
            check_policies(run_of(of), of.spec, Config(**config), by)
        return caught.value

    def test_without_policies_everything_passes(self) -> None:
        of = document(lifetime={"ttlSeconds": 10**6})
        check_policies(run_of(of), of.spec, Config(), Trust())
        count_cell(run_of(of), Trust(), lambda *_: False)

    def test_a_pack_names_all_that_is_wrong(self, trust: Callable[..., Trust]) -> None:
        of = document(
            authority={"egressRules": [RULE]}, correlation={"tenantId": "acme"}, policy={"packId": "theirs", "packVersion": "1.0.0"}
        )
        rejection = self.rejected(of, trust(rules={"maxLifetimeTtlSeconds": 30, "forbidOutboundEgressRules": True}))
        first = "spec.lifetime.ttlSeconds 60 exceeds policy maximum 30"
        second = "policy forbids outbound egress rules but spec declares 1 rule(s)"
        assert str(rejection) == (
            f"cell spec rejected by policy pack 'strict': maxLifetimeTtlSeconds: {first}; forbidOutboundEgressRules: {second}"
        )
        assert rejection.draft.type == "dev.cellos.events.cell.policy.v1.rejected"
        data = rejection.draft.data
        assert data["violationCount"] == 2
        assert data["violations"] == [
            {"rule": "maxLifetimeTtlSeconds", "message": first},
            {"rule": "forbidOutboundEgressRules", "message": second},
        ]
        assert (data["specId"], data["policyPackId"], data["correlation"]["tenantId"]) == ("cell-1", "theirs", "acme")
        assert "runId" not in data

    def test_one_that_keeps_the_rules(self, trust: Callable[..., Trust]) -> None:
        of = document(lifetime={"ttlSeconds": 30})
        check_policies(run_of(of), of.spec, Config(), trust(rules={"maxLifetimeTtlSeconds": 30}))

    @pytest.mark.parametrize(
        ("caller", "why"),
        [
            ("default", 'caller_unmapped: caller identity "default" is not present in'),
            ("ci", 'secret_ref_denied: caller "ci" is not granted secretRef "B" by'),
        ],
    )
    def test_who_asks_counts(self, trust: Callable[..., Trust], caller: str, why: str) -> None:
        of = document(authority={"secretRefs": ["A", "B"]})
        rejection = self.rejected(of, trust(rules={"secretRefAllowlist": {"ci": ["A"]}}), caller=caller)
        assert f"policy pack 'strict': secretRefAllowlist: {why}" in str(rejection)
        assert rejection.draft.data["violations"][0]["rule"] == "secretRefAllowlist"

    def test_an_allowed_caller_passes(self, trust: Callable[..., Trust]) -> None:
        of = document(authority={"secretRefs": ["A"]})
        check_policies(run_of(of), of.spec, Config(caller="ci"), trust(rules={"secretRefAllowlist": {"ci": ["A"]}}))

    @pytest.mark.parametrize(
        ("spec", "message", "data"),
        [
            (
                {},
                "spec.correlation.tenantId is required when an AuthorizationPolicy is configured but the spec did not declare one",
                {"reason": "subject_not_authorized"},
            ),
            (
                {"correlation": {"tenantId": "evil"}},
                'tenantId "evil" is not in the authorization policy subjects list',
                {"reason": "subject_not_authorized", "tenantId": "evil", "subject": "evil"},
            ),
            (
                {"correlation": {"tenantId": "acme"}},
                "spec.placement.poolId is required when the authorization policy declares allowedPools",
                {"reason": "pool_not_allowed", "tenantId": "acme"},
            ),
            (
                {"correlation": {"tenantId": "acme"}, "placement": {"poolId": "x"}},
                'pool "x" is not in the authorization policy allowedPools list',
                {"reason": "pool_not_allowed", "deniedPoolId": "x"},
            ),
            (
                {"correlation": {"tenantId": "acme"}, "placement": {"poolId": "p"}},
                "spec.policy.packId is required when the authorization policy declares allowedPolicyPacks",
                {"reason": "policy_pack_not_allowed"},
            ),
            (
                {"correlation": {"tenantId": "acme"}, "placement": {"poolId": "p"}, "policy": {"packId": "y"}},
                'policy pack "y" is not in the authorization policy allowedPolicyPacks list',
                {"reason": "policy_pack_not_allowed", "deniedPolicyPackId": "y"},
            ),
        ],
    )
    def test_who_may_run_cells(self, trust: Callable[..., Trust], spec: dict[str, Any], message: str, data: dict[str, Any]) -> None:
        by = trust(policy={"subjects": ["acme"], "allowedPools": ["p"], "allowedPolicyPacks": ["k"]})
        rejection = self.rejected(document(**spec), by)
        assert str(rejection) == f"cell spec rejected by authorization policy: {message}"
        assert rejection.draft.type == "dev.cellos.events.cell.authz.v1.rejected"
        assert rejection.draft.data["message"] == message
        assert {name: rejection.draft.data.get(name) for name in data} == data

    def test_it_is_asked_before_the_pack(self, trust: Callable[..., Trust]) -> None:
        by = trust(policy={"subjects": ["acme"]}, rules={"maxLifetimeTtlSeconds": 30})
        assert "authorization policy" in str(self.rejected(document(), by))
        assert "policy pack" in str(self.rejected(document(correlation={"tenantId": "acme"}), by))

    def test_the_hour_of_a_tenant(self, trust: Callable[..., Trust]) -> None:
        of = document(correlation={"tenantId": "acme"})
        by = trust(policy={"subjects": ["acme"], "maxCellsPerHour": 3})
        asked: list[tuple[str, int]] = []
        check_policies(run_of(of), of.spec, Config(), by)
        assert asked == [], "what may still be refused is not counted"
        count_cell(run_of(of), by, lambda subject, most: not asked.append((subject, most)))
        assert asked == [("acme", 3)]
        with pytest.raises(Rejected) as caught:
            count_cell(run_of(of), by, lambda *_: False)
        message = (
            'tenantId "acme" has started 3 cell(s) on this host within the last hour, '
            "the most that the authorization policy allows (maxCellsPerHour)"
        )
        assert str(caught.value) == f"cell spec rejected by authorization policy: {message}"
        assert caught.value.draft.data["reason"] == "rate_limit_exceeded"
        assert (caught.value.draft.data["subject"], caught.value.draft.data["message"]) == ("acme", message)

    def test_without_such_a_limit_nobody_counts(self, trust: Callable[..., Trust]) -> None:
        of = document(correlation={"tenantId": "acme"})
        count_cell(run_of(of), trust(policy={"subjects": ["acme"]}), lambda *_: False)

    def test_what_nobody_limited_gets_the_packs_maximum(self, trust: Callable[..., Trust]) -> None:
        of = document(run={"argv": ["true"], "secretDelivery": "env"})
        granted = Grant(document=of)
        run = bounded(granted, trust(rules={"maxRunTimeoutMs": 100, "maxMemoryMaxBytes": 1 << 20})).document.spec.run
        assert run is not None
        assert run.limits is not None
        assert (run.timeout_ms, run.limits.memory_max_bytes) == (100, 1 << 20)
        assert bounded(granted, Trust()) is granted
        assert bounded(granted, trust(rules={})) is granted
