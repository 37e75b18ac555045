import json
from hashlib import sha256
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.events import Event, canonical_bytes, parse_event, parse_signed, read_line
from cellos.core.evidence.keys import Keyring, read_hmac_keys, read_verify_keys
from cellos.core.evidence.sign import Signer, read_signing, verify
from cellos.errors import ConfigError, EvidenceError

GOLDEN = Path(__file__).parents[3] / "golden" / "events"
SEED = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8"
PUBLIC = "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"
SHARED = "Y2VsbG9zLWhtYWMtZGVtby1rZXk"
LINE = (
    r'{"specversion":"1.0","id":"11111111-2222-4333-8444-555555555555","source":"cellos-supervisor",'
    r'"type":"dev.cellos.events.cell.command.v1.completed","datacontenttype":"application/json",'
    r'"data":{"argv":["/bin/echo","café ✓\n"],"cellId":"demo","durationMs":12,"exitCode":0,"runId":"run-1","specId":"demo"},'
    r'"time":"2026-01-02T03:04:05.000000006+00:00","traceparent":null}'
).encode()
ED25519_SIGNATURE = "BPGrEDlEGvbYLqGm2dAThC8oDHX_cevIxu-OVPEB8LZny_c2dRPpf1EAdBV82DafBdSvVp9o3pStQMi8HUQZCg"
HMAC_SIGNATURE = "DTAmrJ7g9mGq1m5PL85p9NKN1oOCkWAPyNexczbnx7M"
RING = Keyring(ed25519=read_verify_keys(json.dumps({"k1": PUBLIC}).encode()), hmac=read_hmac_keys(json.dumps({"shared": SHARED}).encode()))


def settings(mode: str = "ed25519", kid: str | None = "k1", key: str | None = SEED) -> dict[str, str]:
    given = {"CELLOS_EVENT_SIGNING": mode, "CELLOS_EVENT_SIGNING_KID": kid, "CELLOS_EVENT_SIGNING_KEY_BASE64": key}
    return {name: value for name, value in given.items() if value is not None}


def signer(mode: str = "ed25519", kid: str = "k1", key: str = SEED) -> Signer:
    made = read_signing(settings(mode, kid, key))
    assert made is not None
    return made


ED = signer()
MAC = signer("hmac", "shared", SHARED)


class TestVectors:
    def test_the_signed_bytes(self) -> None:
        assert canonical_bytes(parse_event(LINE)) == LINE
        assert (len(LINE), sha256(LINE).hexdigest()) == (369, "03e2f8a3f0cf9cd33c995076ab05a3fe2e17cd5e93bf52f7fffd00ae32efe85d")

    def test_ed25519(self) -> None:
        wrapped = ED.wrap(parse_event(LINE), LINE)
        assert json.loads(wrapped)["data"]["signature"] == ED25519_SIGNATURE
        assert wrapped + b"\n" == (GOLDEN / "signed-wrapper.jsonl").read_bytes()

    def test_hmac(self) -> None:
        data = json.loads(MAC.wrap(parse_event(LINE), LINE))["data"]
        assert (data["signature"], data["algorithm"], data["signerKid"]) == (HMAC_SIGNATURE, "hmac-sha256", "shared")


EVENTS = st.builds(
    Event,
    id=st.text(max_size=5),
    source=st.text(max_size=5),
    type=st.just("t"),
    datacontenttype=st.sampled_from([None, "application/json"]),
    data=st.dictionaries(st.text(max_size=3), st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5)),
    time=st.none() | st.text(max_size=5),
    traceparent=st.none() | st.text(max_size=5),
)


class TestWrapper:
    def test_its_form(self) -> None:
        event = Event(id="i", source="s", type="t", data={"b": 1, "a": None}, time="now", traceparent="trace")
        wrapped = ED.wrap(event, canonical_bytes(event))
        outer = json.loads(wrapped)
        signature = outer["data"].pop("signature")
        assert outer == {
            "specversion": "1.0",
            "id": "i",
            "source": "/cellos-supervisor/event-signing",
            "type": "dev.cellos.events.signed_envelope.v1",
            "datacontenttype": "application/json",
            "data": {
                "algorithm": "ed25519",
                "event": {
                    "data": {"a": None, "b": 1},
                    "datacontenttype": None,
                    "id": "i",
                    "source": "s",
                    "specversion": "1.0",
                    "time": "now",
                    "traceparent": "trace",
                    "type": "t",
                },
                "signerKid": "k1",
            },
            "time": "now",
            "traceparent": "trace",
        }
        assert "=" not in signature
        assert list(json.loads(wrapped)["data"]["event"]) == sorted(outer["data"]["event"])

    @given(EVENTS, st.sampled_from([ED, MAC]))
    def test_what_is_wrapped_is_read_and_holds(self, event: Event, by: Signer) -> None:
        read, envelope, ours = read_line(by.wrap(event, canonical_bytes(event)))
        assert (read, ours) == (event, True)
        assert envelope is not None
        verify(envelope, RING)

    def test_a_signer_shows_no_key(self) -> None:
        for by in (ED, MAC):
            shown = repr(by) + str(vars(type(by)))
            assert SEED not in shown
            assert "cellos-hmac-demo-key" not in shown


class TestSettings:
    @pytest.mark.parametrize("mode", ["", " ", "off", " OFF "])
    def test_off(self, mode: str) -> None:
        assert read_signing(settings(mode, None, "no key")) is None
        assert read_signing({}) is None

    @pytest.mark.parametrize(
        ("mode", "algorithm"), [("ed25519", "ed25519"), (" ED25519 ", "ed25519"), ("hmac", "hmac-sha256"), ("Hmac-SHA256", "hmac-sha256")]
    )
    def test_on(self, mode: str, algorithm: str) -> None:
        made = signer(mode, "  k1 ", f" {SEED}= ")
        assert (made.algorithm, made.kid) == (algorithm, "k1")

    @pytest.mark.parametrize(
        ("given", "text"),
        [
            (
                settings("rsa"),
                'CELLOS_EVENT_SIGNING="rsa": unknown algorithm (expected off|ed25519|hmac); set one of them, or unset it to run unsigned',
            ),
            (
                settings(kid=None),
                'CELLOS_EVENT_SIGNING_KID="<unset>": CELLOS_EVENT_SIGNING=ed25519 requires a kid but CELLOS_EVENT_SIGNING_KID is unset; ',
            ),
            (settings(kid=" "), 'CELLOS_EVENT_SIGNING_KID="<empty>": kid is empty; '),
            (settings(kid="\udcff"), 'CELLOS_EVENT_SIGNING_KID="<not UTF-8>": kid is not UTF-8; '),
            (
                settings("hmac", key=None),
                'CELLOS_EVENT_SIGNING_KEY_BASE64="<unset>": CELLOS_EVENT_SIGNING=hmac requires a key but CELLOS_EVENT_SIGNING_KEY_BASE64 ',
            ),
            (
                settings(key="not/base64url"),
                'CELLOS_EVENT_SIGNING_KEY_BASE64="<base64 decode failed>": invalid base64url: character 4 is not in the alphabet; ',
            ),
            (
                settings(key="AAAA"),
                'CELLOS_EVENT_SIGNING_KEY_BASE64="<3 bytes>": CELLOS_EVENT_SIGNING=ed25519 requires a 32-byte key, got 3; ',
            ),
            (
                settings(key=" "),
                'CELLOS_EVENT_SIGNING_KEY_BASE64="<empty>": CELLOS_EVENT_SIGNING=ed25519 requires a 32-byte key, got 0; ',
            ),
            (
                settings("hmac", key=""),
                'CELLOS_EVENT_SIGNING_KEY_BASE64="<empty>": CELLOS_EVENT_SIGNING=hmac requires a non-empty key; ',
            ),
        ],
    )
    def test_refused(self, given: dict[str, str], text: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_signing(given)
        assert str(caught.value).startswith(text)
        assert "signing disabled" not in str(caught.value)

    @given(st.sampled_from(["ed25519", "hmac"]), st.text(st.characters(codec="utf-8"), min_size=8))
    def test_no_error_holds_the_key(self, mode: str, key: str) -> None:
        with pytest.raises(ConfigError) as caught:
            read_signing(settings(mode, "k1", key + "!"))
        assert key not in str(caught.value)


class TestVerify:
    @pytest.mark.parametrize(
        ("change", "text"),
        [
            ({"signature": "!"}, "signature is not valid base64url: character 1 is not in the alphabet"),
            (
                {"signature": ED25519_SIGNATURE[:-1] + "h"},
                "signature is not valid base64url: its last character has bits that belong to no",
            ),
            ({"signature": "!", "algorithm": "rsa"}, "signature is not valid base64url: "),
            ({"algorithm": "rsa", "signerKid": "nobody"}, 'unknown algorithm "rsa" (expected ed25519 or hmac-sha256)'),
            ({"algorithm": "ED25519"}, 'unknown algorithm "ED25519" (expected ed25519 or hmac-sha256)'),
            ({"signerKid": "nobody", "signature": "AA"}, 'unknown ed25519 signer kid "nobody"'),
            ({"signerKid": "shared"}, 'unknown ed25519 signer kid "shared"'),
            ({"algorithm": "hmac-sha256"}, 'unknown hmac-sha256 signer kid "k1"'),
            ({"signature": "AA"}, "ed25519 signature must be 64 bytes, got 1"),
            ({"signature": HMAC_SIGNATURE}, "ed25519 signature must be 64 bytes, got 32"),
            ({"signature": "C" + ED25519_SIGNATURE[1:]}, "ed25519 verify failed: "),
            ({"signature": "A" * 86}, "ed25519 verify failed: R of the signature: it has small order (4)"),
            ({"algorithm": "hmac-sha256", "signerKid": "shared"}, "hmac-sha256 mac must be 32 bytes, got 64"),
            ({"algorithm": "hmac-sha256", "signerKid": "shared", "signature": "A" * 43}, "hmac-sha256 verify failed"),
        ],
    )
    def test_refused(self, change: dict[str, str], text: str) -> None:
        outer = json.loads(ED.wrap(parse_event(LINE), LINE))
        outer["data"] |= change
        _, envelope = parse_signed(json.dumps(outer).encode())
        assert envelope is not None
        with pytest.raises(EvidenceError) as caught:
            verify(envelope, RING)
        assert caught.value.text.startswith(f"signed event envelope: {text}")

    @pytest.mark.parametrize("by", [ED, MAC], ids=["ed25519", "hmac"])
    @pytest.mark.parametrize("bare", [False, True])
    def test_form_does_not_matter(self, by: Signer, bare: bool) -> None:
        """White space, order, foreign attributes, padding, a window that is over: none of them is signed."""
        outer = json.loads(by.wrap(parse_event(LINE), LINE))
        data = outer["data"]
        data["event"] = dict(reversed([*data["event"].items(), ("subject", "unsigned")]))
        data |= {"signature": data["signature"] + "=" * (-len(data["signature"]) % 4), "notAfter": "1999-01-01T00:00:00Z"}
        _, envelope = parse_signed(json.dumps(data if bare else outer, indent=1).encode())
        assert envelope is not None
        verify(envelope, RING)

    @pytest.mark.parametrize("member", ["specversion", "id", "source", "type", "datacontenttype", "data", "time", "traceparent"])
    @pytest.mark.parametrize("by", [ED, MAC], ids=["ed25519", "hmac"])
    def test_every_member_of_the_event_is_signed(self, by: Signer, member: str) -> None:
        outer = json.loads(by.wrap(parse_event(LINE), LINE))
        outer["data"]["event"][member] = "other"
        _, envelope = parse_signed(json.dumps(outer).encode())
        assert envelope is not None
        with pytest.raises(EvidenceError, match="verify failed"):
            verify(envelope, RING)
