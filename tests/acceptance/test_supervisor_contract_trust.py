"""What the operator trusts: derivation tokens, policies, the trust keyset. Every token and envelope here is really signed."""

from __future__ import annotations

import base64
import hashlib
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

RULE = {"host": "pkg.example.org", "port": 443, "protocol": "tls"}
OTHER_RULE = {"host": "api.example.org", "port": 8443, "protocol": None}
DERIVED = "lifecycle.v1.started"
UNIVERSAL = "identity.v1.universal_token_accepted_in_permissive_mode"


class Signer:
    """A role, or the signer of keysets, with a key of its own."""

    def __init__(self, name: str, seed: int) -> None:
        self.name = name
        self.key = Ed25519PrivateKey.from_private_bytes(bytes([seed]) * 32)
        self.public = self.key.public_key().public_bytes_raw()

    def token(self, leaf: dict[str, Any], parent: str | None = "run-1") -> dict[str, Any]:
        """What a derivation token of this role is, as anybody can make it who follows the page on documents."""
        rules = [{"port": rule["port"], "host": rule["host"], "protocol": rule.get("protocol")} for rule in leaf.get("egressRules", ())]
        said = {
            "leafCapability": {"egressRules": rules, "secretRefs": leaf.get("secretRefs", [])},
            "parentRunId": parent,
            "roleRoot": self.name,
        }
        signature = self.key.sign(json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode())
        return {
            "roleRoot": self.name,
            "parentRunId": parent,
            "leafCapability": leaf,
            "grantorSignature": {"algorithm": "ed25519", "bytes": base64.b64encode(signature).decode()},
        }

    def envelope(self, payload: dict[str, Any], **members: Any) -> dict[str, Any]:
        raw = json.dumps(payload).encode()
        signed = {"signerKid": self.name, "algorithm": "ed25519", "signature": url64(self.key.sign(raw))}
        return {
            "schemaVersion": "1.0.0",
            "payloadType": "application/vnd.cellos.trust-keyset-v1+json",
            "payload": url64(raw),
            "payloadDigest": digest(raw),
            "producedAt": "2026-01-01T00:00:00Z",
            "signatures": [{**signed, **members.pop("signature", {})}],
            **members,
        }


def url64(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).decode().rstrip("=")


def digest(raw: bytes) -> str:
    return f"sha256:{hashlib.sha256(raw).hexdigest()}"


ROLE, FOREIGN = Signer("role-ci", 7), Signer("role-ci", 8)
LEAF: dict[str, Any] = {"egressRules": [RULE], "secretRefs": ["A"]}


class TestDerivation:
    @pytest.fixture
    def keyed(self, site: Any) -> Any:
        keys = {ROLE.name: base64.b64encode(ROLE.public).decode(), "short": "AAAA", "garbled": "*"}
        site.variables |= {
            "CELLOS_AUTHORITY_KEYS_PATH": site.written("keys.json", keys),
            "CELLOS_BROKER": "env",
            "CELLOS_SECRET_A": "value-of-a",
            "CELLOS_SECRET_B": "value-of-b",
        }
        return site

    @staticmethod
    def authority(token: dict[str, Any], **changed: Any) -> dict[str, Any]:
        return {"authority": {**LEAF, **changed, "authorityDerivation": token}}

    def test_a_genuine_one_is_in_the_record(self, keyed: Any) -> None:
        done = keyed.run("true", **self.authority(ROLE.token(LEAF, "sched-7f21")))
        assert done.returncode == 0, done.stderr
        started = keyed.data(DERIVED)
        assert (started["derivationVerified"], started["roleRoot"], started["parentRunId"]) == (True, "role-ci", "sched-7f21")

    def test_without_one_nothing_is_said(self, keyed: Any) -> None:
        keyed.run("true")
        assert not {"derivationVerified", "roleRoot", "parentRunId"} & set(keyed.data(DERIVED))

    def test_the_order_of_what_it_grants_is_signed_too(self, keyed: Any) -> None:
        leaf = {"egressRules": [OTHER_RULE, RULE], "secretRefs": ["B", "A"]}
        authority = {"egressRules": [RULE, OTHER_RULE], "secretRefs": ["A", "B"]}
        assert keyed.run("true", **self.authority(ROLE.token(leaf), **authority)).returncode == 0
        turned = ROLE.token(leaf) | {"leafCapability": authority}
        assert "authority derivation signature invalid" in keyed.run("true", **self.authority(turned, **authority)).stderr

    @pytest.mark.parametrize(
        ("token", "text"),
        [
            (FOREIGN.token(LEAF), "authority derivation signature invalid"),
            (ROLE.token(LEAF) | {"parentRunId": "run-2"}, "authority derivation signature invalid"),
            (ROLE.token(LEAF) | {"leafCapability": {**LEAF, "secretRefs": []}}, "authority derivation signature invalid"),
            (ROLE.token({}) | {"leafCapability": LEAF}, "authority derivation signature invalid"),
            (Signer("nobody", 7).token(LEAF), "unknown role: nobody"),
            (Signer("short", 7).token(LEAF), "authority derivation verifying key for role short must be 32 bytes (got 3)"),
            (Signer("garbled", 7).token(LEAF), "authority derivation verifying key for role garbled is not valid base64"),
            (
                ROLE.token(LEAF) | {"grantorSignature": {"algorithm": "ed25519", "bytes": "AA=="}},
                "authority derivation grantor signature must be 64 bytes (got 1)",
            ),
            (
                ROLE.token(LEAF) | {"grantorSignature": {"algorithm": "ed25519", "bytes": "-"}},
                "authority derivation grantor signature is not valid base64",
            ),
            (
                ROLE.token({"egressRules": [OTHER_RULE]}),
                ("spec.authorityDerivation.leafCapability exceeds spec.authority — child authority must be ⊆ declared authority"),
            ),
            (ROLE.token({"secretRefs": ["B"]}), "spec.authorityDerivation.leafCapability exceeds spec.authority"),
            (ROLE.token({"egressRules": [RULE | {"protocol": None}]}), "spec.authorityDerivation.leafCapability exceeds spec.authority"),
        ],
    )
    def test_no_other_passes(self, keyed: Any, token: dict[str, Any], text: str) -> None:
        """Whether or not any is required."""
        done = keyed.run("true", **self.authority(token))
        keyed.refused(done, f"Error: invalid cell specification: {text}")
        again = keyed.validate("true", **self.authority(token), variables={"CELLOS_REQUIRE_AUTHORITY_DERIVATION": "1"})
        assert f"Error: invalid cell specification: {text}" in again.stderr

    def test_nobody_is_known_without_a_file_of_keys(self, keyed: Any) -> None:
        del keyed.variables["CELLOS_AUTHORITY_KEYS_PATH"]
        done = keyed.run("true", **self.authority(ROLE.token(LEAF)))
        keyed.refused(done, "invalid cell specification: unknown role: role-ci (CELLOS_AUTHORITY_KEYS_PATH is not set")

    @pytest.mark.parametrize("value", [None, "1", "", "yes", "anything"])
    def test_a_token_of_no_run_is_refused(self, keyed: Any, value: str | None) -> None:
        variables = {} if value is None else {"CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS": value}
        done = keyed.run("true", **self.authority(ROLE.token(LEAF, None)), variables=variables)
        keyed.refused(
            done,
            "authority derivation token has parentRunId: null — universal tokens are rejected by the strict-by-default policy (set "
            "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS to 0/false/no/off to opt into permissive mode, which emits an audit warning event"
            " instead)",
        )

    @pytest.mark.parametrize("value", ["0", " False ", "NO", "off"])
    def test_unless_the_operator_lets_it_pass_which_is_on_record(self, keyed: Any, value: str) -> None:
        variables = {"CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS": value, "CELLOS_RUN_ID": "run-9"}
        done = keyed.run("true", **self.authority(ROLE.token(LEAF, None)), variables=variables)
        assert done.returncode == 0
        [line] = [line for line in done.stderr.splitlines() if "universal token accepted in permissive mode" in line]
        assert "CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS" in line
        data = keyed.data(UNIVERSAL)
        assert (data["cellId"], data["runId"], data["specId"], data["roleRoot"]) == ("cell-1", "run-9", "cell-1", "role-ci")
        assert data["specHash"] == keyed.data(DERIVED)["specHash"]
        assert "universal" in data["reason"]
        assert "permissive" in data["reason"]
        assert data["remediation"]
        assert keyed.types.index(UNIVERSAL) == keyed.types.index(DERIVED) + 1

    def test_forged_is_forged_there_too(self, keyed: Any) -> None:
        variables = {"CELLOS_REQUIRE_SCOPED_DERIVATION_TOKENS": "0"}
        done = keyed.run("true", **self.authority(FOREIGN.token(LEAF, None)), variables=variables)
        keyed.refused(done, "authority derivation signature invalid")

    def test_the_leaf_is_all_that_the_run_gets(self, keyed: Any) -> None:
        wide = {"egressRules": [RULE, OTHER_RULE], "secretRefs": ["A", "B"]}
        done = keyed.run("env", **self.authority(ROLE.token(LEAF), **wide))
        assert done.returncode == 0, done.stderr
        assert "A=value-of-a" in done.stdout.splitlines()
        assert "value-of-b" not in done.stdout
        assert keyed.data("observability.v1.network_scope")["egressRuleCount"] == 1
        assert keyed.data("compliance.v1.summary")["egressRuleCount"] == 1
        assert keyed.data("authority.v1.homeostasis")["declaredSecretCount"] == 1

    def test_what_needs_more_than_the_leaf_is_refused(self, keyed: Any) -> None:
        identity = {"kind": "federatedOidc", "provider": "p", "audience": "a", "secretRef": "B"}
        wide = self.authority(ROLE.token(LEAF), secretRefs=["A", "B"])
        text = "authorityDerivation grants too little, its leafCapability is all that counts: spec.identity.secretRef "
        keyed.refused(keyed.run("true", **wide, identity=identity), text)

    @pytest.mark.parametrize(
        ("keys", "text"),
        [
            (None, "cannot read '{path}': No such file or directory (os error 2)"),
            ("{", "JSON parse error in '{path}': line 1 column 2"),
            ("[]", "'{path}': the document must be an object"),
        ],
    )
    def test_keys_that_cannot_be_read(self, keyed: Any, keys: str | None, text: str) -> None:
        path = keyed.written("bad.json", keys) if keys else str(keyed.place / "none")
        done = keyed.run("true", variables={"CELLOS_AUTHORITY_KEYS_PATH": path})
        keyed.refused(done, "Error: CELLOS_AUTHORITY_KEYS_PATH: ")
        assert text.format(path=path) in done.stderr

    def test_keys_behind_a_link_are_not_read(self, keyed: Any) -> None:
        link = keyed.place / "link"
        link.symlink_to(keyed.variables["CELLOS_AUTHORITY_KEYS_PATH"])
        text = f"Error: CELLOS_AUTHORITY_KEYS_PATH: cannot read '{link}': Too many levels of symbolic links (os error 40)"
        keyed.refused(keyed.run("true", variables={"CELLOS_AUTHORITY_KEYS_PATH": str(link)}), text)


K1, K2, STRANGER = Signer("k1", 1), Signer("k2", 2), Signer("k9", 9)
PAYLOAD = {"keysetId": "fleet-2031", "keys": []}
VERIFIED, FAILED = "trust.v1.keyset_verified", "trust.v1.keyset_verification_failed"


class TestKeyset:
    @pytest.fixture
    def trusting(self, site: Any) -> Any:
        site.variables["CELLOS_TRUST_VERIFY_KEYS_PATH"] = site.written("ring.json", {key.name: url64(key.public) for key in (K1, K2)})
        return site

    def test_one_that_holds_is_on_record(self, trusting: Any) -> None:
        path = trusting.written("keyset.json", K1.envelope(PAYLOAD))
        assert trusting.run("true", variables={"CELLOS_TRUST_KEYSET_PATH": path}).returncode == 0
        assert trusting.types[0] == VERIFIED
        data = trusting.data(VERIFIED)
        assert (data["schemaVersion"], data["keysetId"], data["verifiedSignerKid"]) == ("1.0.0", "fleet-2031", "k1")
        assert data["payloadDigest"] == digest(json.dumps(PAYLOAD).encode())
        assert not {"cellId", "specId", "runId"} & set(data)

    def test_of_a_chain_the_last_is_told(self, trusting: Any) -> None:
        later = K2.envelope({}, replacesEnvelopeDigest=digest(json.dumps(PAYLOAD).encode()))
        paths = [trusting.written("first.json", K1.envelope(PAYLOAD)), trusting.written("second.json", later)]
        variables = {"CELLOS_TRUST_KEYSET_CHAIN_PATH": f" {paths[0]} ,\n{paths[1]}\n", "CELLOS_TRUST_KEYSET_PATH": "/nowhere"}
        assert trusting.run("true", variables=variables | {"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "1"}).returncode == 0
        assert (trusting.data(VERIFIED)["keysetId"], trusting.data(VERIFIED)["verifiedSignerKid"]) == ("(unknown)", "k2")

    def failed(self, site: Any, variables: dict[str, str], reason: str, *, attempted: str) -> None:
        """An event, and the run goes on; where a keyset is required, an error."""
        assert site.run("true", variables=variables).returncode == 0
        assert site.types[0] == FAILED
        data = site.data(FAILED)
        assert data["attemptedKeysetPath"] == attempted
        assert reason in data["reason"]
        [variable] = variables
        text = f"Error: {variable}: verification failed under CELLOS_REQUIRE_TRUST_VERIFY_KEYS=1: "
        site.jsonl.unlink()
        done = site.run("true", variables=variables | {"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "on"})
        site.refused(done, text)
        assert reason in done.stderr
        assert reason in site.validate("true", variables=variables | {"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "on"}).stderr

    @pytest.mark.parametrize(
        ("envelope", "reason"),
        [
            (STRANGER.envelope(PAYLOAD), "signed trust keyset envelope: no signature verified"),
            (K2.envelope(PAYLOAD, signature={"signerKid": "k1"}), "signed trust keyset envelope: no signature verified"),
            (K1.envelope(PAYLOAD, requiredSignerCount=2), "only 1 distinct signers verified, need 2"),
            (K1.envelope(PAYLOAD, payloadDigest="sha256:00"), "payload digest mismatch: declared=sha256:00, computed=sha256:"),
            (K1.envelope(PAYLOAD, signatures=[]), "has no signatures"),
            (K1.envelope(PAYLOAD, payloadType="x"), "payloadType must be "),
            (
                K1.envelope(PAYLOAD, signature={"notAfter": (datetime.now(UTC) - timedelta(days=1)).isoformat()}),
                "no signature verified",
            ),
            ("{", "JSON parse error in "),
            (None, "cannot read "),
        ],
    )
    def test_one_that_does_not(self, trusting: Any, envelope: Any, reason: str) -> None:
        path = str(trusting.place / "keyset.json") if envelope is None else trusting.written("keyset.json", envelope)
        self.failed(trusting, {"CELLOS_TRUST_KEYSET_PATH": path}, reason, attempted="keyset.json")

    def test_a_chain_that_is_broken(self, trusting: Any) -> None:
        foreign = K2.envelope({}, replacesEnvelopeDigest=digest(b"another"))
        paths = [trusting.written("first.json", K1.envelope(PAYLOAD)), trusting.written("second.json", foreign)]
        chain = {"CELLOS_TRUST_KEYSET_CHAIN_PATH": ",".join(paths)}
        self.failed(trusting, chain, "envelope at index 1 replacesEnvelopeDigest mismatch: declared=", attempted="second.json")

    def test_an_empty_chain(self, trusting: Any) -> None:
        reason = "CELLOS_TRUST_KEYSET_CHAIN_PATH set but parsed no envelope paths"
        self.failed(trusting, {"CELLOS_TRUST_KEYSET_CHAIN_PATH": " ,\n"}, reason, attempted="(empty chain)")

    def test_keys_are_required(self, site: Any) -> None:
        text = "Error: CELLOS_REQUIRE_TRUST_VERIFY_KEYS is set but CELLOS_TRUST_VERIFY_KEYS_PATH is unset"
        site.refused(site.run("true", variables={"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "TRUE"}), text)
        assert site.run("true", variables={"CELLOS_REQUIRE_TRUST_VERIFY_KEYS": "0"}).returncode == 0

    @pytest.mark.parametrize(
        ("keys", "text"),
        [
            (None, "cannot open"),
            (b"\xff", "UTF-8"),
            (b"[]", "top-level value must be a JSON object mapping kid -> base64url-pubkey"),
            (b'{"k": "AA", "k": "AA"}', 'duplicate kid "k" in keys file'),
            (b'{"k": "*"}', 'kid "k" value is not valid base64url'),
            (b'{"k": "AAAA"}', 'kid "k" decoded to 3 bytes, expected 32'),
        ],
    )
    def test_keys_that_are_wrong_stop_every_start(self, site: Any, keys: bytes | None, text: str) -> None:
        path = str(site.place / "ring.json") if keys is None else site.written("ring.json", keys)
        done = site.run("true", variables={"CELLOS_TRUST_VERIFY_KEYS_PATH": path})
        site.refused(done, f"Error: CELLOS_TRUST_VERIFY_KEYS_PATH: cannot load '{path}': trust verify keys: ")
        assert text in done.stderr

    def test_no_keys_are_keys(self, site: Any) -> None:
        assert site.run("true", variables={"CELLOS_TRUST_VERIFY_KEYS_PATH": site.written("ring.json", {})}).returncode == 0


def test_what_policies_refuse_is_signed_like_everything_else(site: Any) -> None:
    pack = {"apiVersion": "cellos.io/v1", "kind": "PolicyPack", "spec": {"id": "house", "rules": {"maxLifetimeTtlSeconds": 1}}}
    site.variables |= {
        "CELLOS_POLICY_PACK_PATH": site.written("pack.json", pack),
        "CELLOS_EVENT_SIGNING": "hmac",
        "CELLOS_EVENT_SIGNING_KID": "k",
        "CELLOS_EVENT_SIGNING_KEY_BASE64": "a2V5",
        "CELLOS_REDACT_EVENT_FIELDS": "violations",
    }
    site.refused(site.run("true"), "cell spec rejected by policy pack 'house': maxLifetimeTtlSeconds: ", events=["policy.v1.rejected"])
    assert site.data("policy.v1.rejected")["violations"] == ["[redacted]"]
    assert json.loads(site.jsonl.read_text())["type"] == "dev.cellos.events.signed_envelope.v1"
