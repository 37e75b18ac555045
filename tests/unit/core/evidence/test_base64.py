import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.evidence.base64 import Base64Error, decode_standard, decode_url, encode_url

ALPHABETS = "ABCxyz019+/-_= \n\0é\ud800"


def standard(raw: bytes) -> str:
    return base64.b64encode(raw).decode()


@given(st.binary(max_size=80))
def test_round_trip(raw: bytes) -> None:
    assert encode_url(raw) == base64.urlsafe_b64encode(raw).decode().rstrip("=")
    assert decode_standard(standard(raw)) == decode_url(encode_url(raw)) == raw
    assert decode_url(base64.urlsafe_b64encode(raw).decode()) == raw


@given(st.text(ALPHABETS, max_size=12))
def test_bytes_have_one_text(text: str) -> None:
    """But for the padding of base64url, which may be left out."""
    for decode, encode, bare in ((decode_standard, standard, False), (decode_url, encode_url, True)):
        try:
            raw = decode(text)
        except Base64Error:
            pass
        else:
            assert encode(raw) == (text.rstrip("=") if bare else text)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("AA", "its length is 2 characters, not a multiple of four"),
        ("AA= =", "its length is 5 characters, not a multiple of four"),
        ("A A=", "character 2 is not in the alphabet"),
        ("AA\n=", "character 3 is not in the alphabet"),
        ("A===", "character 2 is not in the alphabet"),
        ("AA=A", "character 3 is not in the alphabet"),
        ("é-AA", "character 1 is not in the alphabet"),
        ("AAé=", "character 3 is not in the alphabet"),
        ("AA-_", "character 3 is not in the alphabet"),
        ("AB==", "its last character has bits that belong to no byte"),
        ("AAB=", "its last character has bits that belong to no byte"),
    ],
)
def test_standard_refuses(text: str, why: str) -> None:
    with pytest.raises(Base64Error) as caught:
        decode_standard(text)
    assert str(caught.value) == why


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("AAAAA", "no bytes have a text of 5 characters"),
        ("AA=", "its padding does not fit its length"),
        ("AAAA=", "its padding does not fit its length"),
        ("AAAA====", "character 5 is not in the alphabet"),
        ("AA+/", "character 3 is not in the alphabet"),
        (" AAA", "character 1 is not in the alphabet"),
        ("AB", "its last character has bits that belong to no byte"),
        ("AB==", "its last character has bits that belong to no byte"),
        ("\udcff", "character 1 is not in the alphabet"),
    ],
)
def test_url_refuses(text: str, why: str) -> None:
    with pytest.raises(Base64Error) as caught:
        decode_url(text)
    assert str(caught.value) == why
