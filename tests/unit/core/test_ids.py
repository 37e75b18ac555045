import uuid

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.ids import TimeSyntaxError, rfc3339, unix_ns, uuid4, uuid7

MILLISECONDS = st.integers(0, (1 << 48) - 1)
RANDOM = st.binary(min_size=10, max_size=10)
NANOSECONDS = st.integers(0, 253_402_300_799 * 10**9)


@given(MILLISECONDS, RANDOM)
def test_uuid7_has_the_bits_of_rfc_9562(ms: int, random: bytes) -> None:
    text = uuid7(ms, random)
    read = uuid.UUID(text)
    assert str(read) == text
    assert (read.version, read.variant) == (7, uuid.RFC_4122)
    assert read.int >> 80 == ms


def test_uuid7_example_of_rfc_9562() -> None:
    """Appendix A.6: rand_a 0xCC3, rand_b 0x18C4DC0C0C07398F."""
    noise = (0xCC3 << 62) | 0x18C4DC0C0C07398F
    assert uuid7(0x017F22E279B0, noise.to_bytes(10, "big")) == "017f22e2-79b0-7cc3-98c4-dc0c0c07398f"


@given(MILLISECONDS, MILLISECONDS, RANDOM, RANDOM)
def test_uuid7_sorts_by_time(one: int, other: int, random: bytes, more: bytes) -> None:
    if one < other:
        assert uuid7(one, random) < uuid7(other, more)


@given(MILLISECONDS, RANDOM, RANDOM)
def test_uuid7_keeps_74_random_bits(ms: int, random: bytes, more: bytes) -> None:
    used = (1 << 74) - 1
    same = int.from_bytes(random, "big") & used == int.from_bytes(more, "big") & used
    assert (uuid7(ms, random) == uuid7(ms, more)) == same


@pytest.mark.parametrize(("ms", "random"), [(-1, bytes(10)), (1 << 48, bytes(10)), (0, bytes(9)), (0, bytes(11))])
def test_uuid7_refuses_what_does_not_fit(ms: int, random: bytes) -> None:
    with pytest.raises(ValueError, match=r"48 bits|10 random bytes"):
        uuid7(ms, random)


@pytest.mark.parametrize(
    ("ns", "text"),
    [
        (0, "1970-01-01T00:00:00.000000000+00:00"),
        (1_767_323_045_000_000_006, "2026-01-02T03:04:05.000000006+00:00"),
        (951_782_400_999_999_999, "2000-02-29T00:00:00.999999999+00:00"),
    ],
)
def test_rfc3339(ns: int, text: str) -> None:
    assert rfc3339(ns) == text
    assert unix_ns(text) == ns


@given(st.binary(min_size=16, max_size=16))
def test_uuid4_has_the_bits_of_rfc_9562(random: bytes) -> None:
    assert uuid4(random) == str(uuid.UUID(bytes=random, version=4))


@given(NANOSECONDS)
def test_times_survive(ns: int) -> None:
    assert unix_ns(rfc3339(ns)) == ns


@given(NANOSECONDS, NANOSECONDS)
def test_times_sort_as_text(one: int, other: int) -> None:
    assert (rfc3339(one) < rfc3339(other)) == (one < other)


@pytest.mark.parametrize(
    "text",
    [
        "2026-01-02T03:04:05.006+00:00",
        "2026-01-02T03:04:05.006Z",
        "2026-01-02T03:04:05.006000Z",
        "2026-01-02T05:04:05.006+02:00",
        "2026-01-01T22:34:05.0060000004-04:30",
        "2026-01-02t03:04:05.006z",
    ],
)
def test_every_form_of_a_time_reads_the_same(text: str) -> None:
    assert unix_ns(text) == 1_767_323_045_006_000_000


@given(NANOSECONDS, st.integers(0, 34), st.sampled_from("0123456789-:.+TtZzW \n٢"))
def test_our_own_form_is_read_as_strictly_as_all_others(ns: int, place: int, character: str) -> None:
    """It has a way of its own, which takes nothing that the same time in another form would not be read from."""
    text = rfc3339(ns)
    changed = text[:place] + character + text[place + 1 :]
    other = changed.removesuffix("+00:00") + "Z" if changed.endswith("+00:00") else changed
    try:
        expected = unix_ns(other)
    except TimeSyntaxError:
        with pytest.raises(TimeSyntaxError):
            unix_ns(changed)
    else:
        assert unix_ns(changed) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "now",
        "2026-01-02",
        "2026-01-02T03:04:05",
        "2026-13-02T03:04:05Z",
        "2026-01-02T25:04:05Z",
        "2026-01-02T03:04:05Z\n",
        "٢٠٢٦-01-02T03:04:05Z",
    ],
)
def test_what_is_not_a_time(text: str) -> None:
    with pytest.raises(TimeSyntaxError, match="not an RFC 3339 time"):
        unix_ns(text)
