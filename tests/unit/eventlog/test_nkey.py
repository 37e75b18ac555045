from __future__ import annotations

import base64

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError
from cellos.eventlog.nkey import Nkey, _encoded, read_credentials_file, read_seed_file

# The pair of https://docs.nats.io/running-a-nats-service/configuration/securing_nats/auth_intro/nkey_auth
SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
PUBLIC = "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"
CREDENTIALS = f"""-----BEGIN NATS USER JWT-----
head.body.signature
------END NATS USER JWT------

************************* IMPORTANT *************************
-----BEGIN USER NKEY SEED-----
{SEED}
------END USER NKEY SEED------
"""


def test_the_pair_of_the_documentation() -> None:
    assert Nkey(f" {SEED}\n", where="here").public == PUBLIC


@given(st.text(max_size=30))
def test_what_it_signs_its_public_key_verifies(nonce: str) -> None:
    signature = Nkey(SEED, where="here").sign(nonce)
    raw = base64.urlsafe_b64decode(signature + "=" * (-len(signature) % 4))
    Ed25519PublicKey.from_public_bytes(base64.b32decode(PUBLIC)[1:33]).verify(raw, nonce.encode())


@pytest.mark.parametrize(
    "seed",
    ["", "SU", SEED[:-1], SEED + "A", SEED.lower(), SEED[:20] + "A" + SEED[21:], PUBLIC, "é" * 58, _encoded(bytes(34))],
    ids=["empty", "prefix", "short", "long", "lower case", "misread", "public key", "letters", "no seed"],
)
def test_what_is_no_seed_is_refused_and_not_quoted(seed: str) -> None:
    with pytest.raises(ConfigError, match="here: is no NKey seed") as raised:
        Nkey(seed, where="here")
    assert len(seed) < 3 or seed not in str(raised.value)


def test_the_seed_of_an_account_is_refused() -> None:
    with pytest.raises(ConfigError, match="another kind of key"):
        Nkey(_encoded(bytes([18 << 3, 0]) + bytes(32)), where="here")


def test_files(tmp_path: pytest.TempPathFactory) -> None:
    path = f"{tmp_path}/file"
    for text in (SEED, CREDENTIALS):
        with open(path, "w") as file:
            file.write(text)
        assert read_seed_file(path).public == PUBLIC
    found = read_credentials_file(path)
    assert (found.jwt, found.key.public) == ("head.body.signature", PUBLIC)
    assert "head" not in repr(found.key)
    with open(path, "wb") as binary:
        binary.write(b"\xff\xfe")
    with pytest.raises(ConfigError, match="is no text"):
        read_credentials_file(path)
    with open(path, "w") as file:
        file.write(CREDENTIALS.replace("SEED", "SHED"))
    with pytest.raises(ConfigError, match="holds no NKey seed"):
        read_credentials_file(path)
