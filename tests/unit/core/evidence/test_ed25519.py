"""The curve is written out here a second time, by RFC 8032, to make keys and signatures that no library would make."""

import hashlib
from itertools import count

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from cellos.core.evidence.ed25519 import ORDER, KeyRefusedError, private_key, public_key, signature_fault

P = 2**255 - 19
D = -121665 * pow(121666, -1, P) % P
Point = tuple[int, int]
ZERO: Point = (0, 1)


def add(one: Point, other: Point) -> Point:
    (x1, y1), (x2, y2) = one, other
    product = D * x1 * x2 * y1 * y2 % P
    x = (x1 * y2 + y1 * x2) * pow(1 + product, -1, P) % P
    return x, (y1 * y2 + x1 * x2) * pow(1 - product, -1, P) % P


def times(scalar: int, point: Point) -> Point:
    result = ZERO
    while scalar:
        if scalar & 1:
            result = add(result, point)
        point = add(point, point)
        scalar >>= 1
    return result


def with_y(y: int) -> Point | None:
    """The point with that y and an even x, if there is one."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if x * x % P != square:
        x = x * pow(2, (P - 1) // 4, P) % P
    if x * x % P != square:
        return None
    return (P - x) % P if x & 1 else x, y % P


def encode(point: Point) -> bytes:
    return (point[1] | (point[0] & 1) << 255).to_bytes(32, "little")


def some_torsion() -> Point:
    """A point of order 8: what is left of any point when the large subgroup is taken out."""
    for y in count(2):
        point = with_y(y)
        if point is not None and times(4, torsion := times(ORDER, point)) != ZERO:
            return torsion
    raise AssertionError


BASE = with_y(4 * pow(5, -1, P) % P)
assert BASE is not None
TORSION = some_torsion()
SMALL = [times(multiple, TORSION) for multiple in range(8)]
SECRET, NONCE = 0x1234567890ABCDEF, 0xFEDCBA0987654321
KEY = times(SECRET, BASE)
MESSAGE = b"message"


def challenge(r: bytes, key: bytes, message: bytes) -> int:
    return int.from_bytes(hashlib.sha512(r + key + message).digest(), "little") % ORDER


def sign(r: Point, key: Point, message: bytes, nonce: int) -> bytes:
    s = (nonce + challenge(encode(r), encode(key), message) * SECRET) % ORDER
    return encode(r) + s.to_bytes(32, "little")


def test_rfc_8032_vector() -> None:
    seed = bytes.fromhex("9d61b19deffd5a60ba844af492ec2cc44449c5697b326919703bac031cae7f60")
    key = bytes.fromhex("d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a")
    signature = bytes.fromhex(
        "e5564300c360ac729086e2cc806e828a84877f1eb8e5d974d873e065224901555fb8821590a33bacc61e39701cf9b46bd25bf5f0595bbe24655141438e7a100b"
    )
    assert private_key(seed).sign(b"") == signature
    assert signature_fault(public_key(key), signature, b"") is None
    assert signature_fault(public_key(key), signature, b" ") == "it is not the signature of these bytes by this key"


def test_a_signature_made_by_hand() -> None:
    assert signature_fault(public_key(encode(KEY)), sign(times(NONCE, BASE), KEY, MESSAGE, NONCE), MESSAGE) is None


@pytest.mark.parametrize("order", [1, 2, 4, 8])
def test_keys_of_small_order(order: int) -> None:
    points = [point for point in SMALL if times(order, point) == ZERO and (order == 1 or times(order // 2, point) != ZERO)]
    assert len(points) == max(1, order // 2)
    for point in points:
        with pytest.raises(KeyRefusedError, match=rf"^it has small order \({order}\)$"):
            public_key(encode(point))


@pytest.mark.parametrize("sign_bit", [0, 0x80])
@pytest.mark.parametrize(
    "known",
    [
        "0000000000000000000000000000000000000000000000000000000000000000",
        "0100000000000000000000000000000000000000000000000000000000000000",
        "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        "c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a",
        "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "edffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
        "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
    ],
)
def test_known_encodings_of_small_order(known: str, sign_bit: int) -> None:
    """All fourteen, the ones that are not canonical included."""
    raw = bytearray.fromhex(known)
    raw[31] |= sign_bit
    with pytest.raises(KeyRefusedError, match="small order"):
        public_key(bytes(raw))


@pytest.mark.parametrize("sign_bit", [0, 1])
def test_keys_in_another_form_than_the_canonical_one(sign_bit: int) -> None:
    refused = []
    for y in range(P, 2**255):
        with pytest.raises(KeyRefusedError) as caught:
            public_key((y | sign_bit << 255).to_bytes(32, "little"))
        refused.append(str(caught.value))
    assert refused.count("it is not in canonical form") == 17


@given(st.integers(2, P - 2), st.integers(0, 1))
def test_only_points_of_the_curve_are_keys(y: int, sign_bit: int) -> None:
    raw = (y | sign_bit << 255).to_bytes(32, "little")
    assume(all(y != small for _, small in SMALL))  # they are refused for another reason
    if with_y(y) is None:
        with pytest.raises(KeyRefusedError, match="not a point of the curve"):
            public_key(raw)
    else:
        assert public_key(raw).public_bytes_raw() == raw


@pytest.mark.parametrize("point", SMALL)
def test_r_of_small_order(point: Point) -> None:
    """With R = 0 the equation holds: the library says yes to this one."""
    fault = signature_fault(public_key(encode(KEY)), sign(point, KEY, MESSAGE, 0), MESSAGE)
    assert fault is not None
    assert fault.startswith("R of the signature: it has small order")


def test_r_that_is_not_canonical() -> None:
    raw = (P + 3).to_bytes(32, "little") + bytes(32)
    assert signature_fault(public_key(encode(KEY)), raw, MESSAGE) == "R of the signature: it is not in canonical form"


def test_s_plus_the_order() -> None:
    signature = sign(times(NONCE, BASE), KEY, MESSAGE, NONCE)
    s = int.from_bytes(signature[32:], "little") + ORDER
    assert signature_fault(public_key(encode(KEY)), signature[:32] + s.to_bytes(32, "little"), MESSAGE) == (
        "S of the signature is not below the order of the group"
    )


@pytest.mark.parametrize("point", SMALL[1:])
def test_r_with_a_part_of_small_order(point: Point) -> None:
    """It would hold where the equation is multiplied by the cofactor, so one message had eight signatures."""
    mixed = add(times(NONCE, BASE), point)
    assert signature_fault(public_key(encode(KEY)), sign(mixed, KEY, MESSAGE, NONCE), MESSAGE) is not None


def test_a_key_with_a_part_of_small_order() -> None:
    """Its owner can make signatures that other readers refuse; here such a signature holds only where that part vanishes."""
    key, r = add(KEY, TORSION), times(NONCE, BASE)
    held = set()
    for number in range(40):
        message = str(number).encode()
        vanishes = challenge(encode(r), encode(key), message) % 8 == 0
        assert (signature_fault(public_key(encode(key)), sign(r, key, message, NONCE), message) is None) == vanishes
        held.add(vanishes)
    assert held == {True, False}


@given(st.data())
def test_any_changed_bit(data: st.DataObject) -> None:
    signature = sign(times(NONCE, BASE), KEY, MESSAGE, NONCE)
    message, place = bytearray(MESSAGE), data.draw(st.integers(0, (64 + len(MESSAGE)) * 8 - 1))
    changed = bytearray(signature + MESSAGE)
    changed[place // 8] ^= 1 << place % 8
    message = changed[64:]
    assert signature_fault(public_key(encode(KEY)), bytes(changed[:64]), bytes(message)) is not None
