import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.policy.version import FLOOR, version_faults

TOO_OLD = "is older than runtime-supported floor 1.0.0 (set CELLOS_POLICY_ALLOW_DOWNGRADE=1 to override)"
NUMBERS = st.integers(0, 2**64 - 1)


def faults(text: str, *, allow_downgrade: bool = False) -> list[str]:
    return list(version_faults(text, allow_downgrade=allow_downgrade))


@pytest.mark.parametrize("text", ["1.0.0", "1.0.1", "2.0.0", "1.0.0-rc.1", "1.0.0--", "10.20.30-A.b-9", "18446744073709551615.0.0"])
def test_the_floor_and_what_is_newer_pass(text: str) -> None:
    assert faults(text) == []


@pytest.mark.parametrize("text", ["0.9.9", "0.0.0", "0.99.0-rc.1"])
def test_the_floor_can_be_lifted(text: str) -> None:
    assert faults(text) == [f"policy pack spec.version {text} {TOO_OLD}"]
    assert faults(text, allow_downgrade=True) == []


@pytest.mark.parametrize("allow_downgrade", [False, True])
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1.0", '"1.0" must be a MAJOR.MINOR.PATCH semver string'),
        ("v1.0", '"v1.0" must be a MAJOR.MINOR.PATCH semver string'),
        ("", '"" must be a MAJOR.MINOR.PATCH semver string'),
        ("1.0.0.0", '"1.0.0.0" must be a MAJOR.MINOR.PATCH semver string'),
        ("-rc", '"-rc" must be a MAJOR.MINOR.PATCH semver string'),
        ("1.0.0-", '"1.0.0-" has malformed pre-release suffix'),
        ("1.0.0-é", '"1.0.0-é" has malformed pre-release suffix'),
        ("0.0-a b", '"0.0-a b" has malformed pre-release suffix'),
        ("1.0.0+build", '"1.0.0+build" component "0+build" is not a non-negative integer'),
        ("1..0", '"1..0" component "" is not a non-negative integer'),
        ("1.0.\u0661", '"1.0.\u0661" component "\u0661" is not a non-negative integer'),
        ("01.0.0", '"01.0.0" component "01" has a leading zero'),
        ("1.00.0", '"1.00.0" component "00" has a leading zero'),
        ("1.0.18446744073709551616", '"1.0.18446744073709551616" component "18446744073709551616" overflows u64'),
    ],
)
def test_what_is_no_version_fails_in_any_case(text: str, words: str, *, allow_downgrade: bool) -> None:
    assert faults(text, allow_downgrade=allow_downgrade) == [f"policy pack spec.version {words}"]


def test_a_number_of_any_length_is_told_not_read() -> None:
    assert faults(f"1.0.{'9' * 5000}")[0].endswith("overflows u64")


@given(NUMBERS, NUMBERS, NUMBERS, st.from_regex(r"(-[A-Za-z0-9.-]+)?", fullmatch=True))
def test_versions_are_ordered_by_their_numbers_alone(major: int, minor: int, patch: int, suffix: str) -> None:
    assert bool(faults(f"{major}.{minor}.{patch}{suffix}")) == ((major, minor, patch) < FLOOR)


@given(st.text(max_size=12) | st.text("0123456789.-v", max_size=12))
def test_any_text_gets_at_most_one_fault(text: str) -> None:
    assert len(faults(text)) <= 1
