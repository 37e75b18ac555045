import base64
import json

import pytest

from cellos.core.evidence.keys import Keyring, read_hmac_keys, read_verify_keys
from cellos.errors import ConfigError

PUBLIC = "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"


def test_public_keys() -> None:
    keys = read_verify_keys(json.dumps({"k1": PUBLIC, "": PUBLIC + "="}).encode())
    assert list(keys) == ["k1", ""]
    assert {key.public_bytes_raw() for key in keys.values()} == {base64.urlsafe_b64decode(PUBLIC + "=")}


def test_no_keys() -> None:
    assert read_verify_keys(b"{}") == {}
    assert not Keyring()
    assert Keyring(hmac={"k": b"k"})


def test_shared_keys() -> None:
    assert read_hmac_keys(b'{"k1": "Y2VsbG9zLWhtYWMtZGVtby1rZXk", "short": "AA=="}') == {"k1": b"cellos-hmac-demo-key", "short": b"\0"}


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"{", "JSON parse error: line 1 column 2: the document ends too early"),
        (b"", "JSON parse error: the document is empty"),
        (b"\xff", "JSON parse error: line 1 column 1: byte 0xff is not UTF-8"),
        (b"[]", "top-level value must be a JSON object mapping kid -> base64url-pubkey"),
        (b'"k"', "top-level value must be a JSON object mapping kid -> base64url-pubkey"),
        (b'{"a": "AA", "a": "AA"}', 'duplicate kid "a" in keys file'),
        (b'{"two words": 1, "two\\u0020words": 2}', 'duplicate kid "two words" in keys file'),
        (b'{"a": {"b": 1, "b": 2}}', "JSON parse error: a.b is given more than once"),
        (b'{"a": 1}', 'value for kid "a" must be a base64url string, got a number'),
        (b'{"a": 123456789012345678901234567890}', 'value for kid "a" must be a base64url string, got a number'),
        (b'{"a": null}', 'value for kid "a" must be a base64url string, got null'),
        (b'{"a\\n": ["AA"]}', 'value for kid "a\\n" must be a base64url string, got a list'),
        (b'{"a": "!!"}', 'kid "a" value is not valid base64url: character 1 is not in the alphabet'),
        (b'{"a": "AB"}', 'kid "a" value is not valid base64url: its last character has bits that belong to no byte'),
    ],
)
@pytest.mark.parametrize(("read", "prefix"), [(read_verify_keys, "trust verify keys: "), (read_hmac_keys, "HMAC verify keys: ")])
def test_refused_files(raw: bytes, text: str, read: object, prefix: str) -> None:
    assert callable(read)
    with pytest.raises(ConfigError) as caught:
        read(raw)
    assert str(caught.value) == prefix + text


@pytest.mark.parametrize(
    ("key", "text"),
    [
        (bytes(31), "decoded to 31 bytes, expected 32"),
        (b"", "decoded to 0 bytes, expected 32"),
        (bytes(32), "is not a valid Ed25519 verifying key: it has small order (4)"),
        (b"\x02" + bytes(31), "is not a valid Ed25519 verifying key: it is not a point of the curve"),
        (b"\xf0" + b"\xff" * 30 + b"\x7f", "is not a valid Ed25519 verifying key: it is not in canonical form"),
    ],
)
def test_refused_public_keys(key: bytes, text: str) -> None:
    raw = json.dumps({"a": base64.urlsafe_b64encode(key).decode()}).encode()
    with pytest.raises(ConfigError) as caught:
        read_verify_keys(raw)
    assert str(caught.value) == f'trust verify keys: kid "a" {text}'


def test_an_empty_shared_key() -> None:
    with pytest.raises(ConfigError, match=r'^HMAC verify keys: kid "a" has an empty key$'):
        read_hmac_keys(b'{"a": ""}')


def test_no_error_and_no_text_holds_a_shared_key() -> None:
    secret = "c2VjcmV0LXNlY3JldC1zZWNyZXQ"
    for raw in (f'{{"a": "{secret}!"}}', f'{{"a": ["{secret}"]}}', f'{{"a": "{secret}", "a": "{secret}"}}'):
        with pytest.raises(ConfigError) as caught:
            read_hmac_keys(raw.encode())
        assert secret not in str(caught.value)
    assert "secret" not in repr(Keyring(hmac=read_hmac_keys(f'{{"a": "{secret}"}}'.encode())))
