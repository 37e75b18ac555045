import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents.identifiers import (
    FQDN,
    NAMESPACE,
    PORTABLE,
    SEMVER3,
    SHA256,
    ascii_lower,
    is_portable,
    matches,
    reserved_in_subjects,
)


@pytest.mark.parametrize("value", ["a", "Z9", "0", "a.b-c_d", "a.b.c", "x" * 128, "7-"])
def test_portable(value: str) -> None:
    assert is_portable(value)


@pytest.mark.parametrize("value", ["", ".a", "_a", "-a", "a..b", "a/b", "a\\b", "a b", "a\n", "é", "x" * 129, "a\0", "..", "a.."])
def test_not_portable(value: str) -> None:
    assert not is_portable(value)


@given(st.text(alphabet="aZ09._-/ é\n\0", max_size=8) | st.text(alphabet="a.", min_size=126, max_size=130) | st.text(max_size=6))
def test_portable_is_what_its_pattern_says(value: str) -> None:
    assert is_portable(value) == matches(PORTABLE, value)


@pytest.mark.parametrize("value", ["a", "cells-fin", "0", "a" * 63, "1-2"])
def test_namespace(value: str) -> None:
    assert matches(NAMESPACE, value)


@pytest.mark.parametrize("value", ["", "Cells", "-a", "a-", "a.b", "a_b", "a" * 64, "a\n"])
def test_not_a_namespace(value: str) -> None:
    assert not matches(NAMESPACE, value)


def test_sha256() -> None:
    assert matches(SHA256, "sha256:" + "0a" * 32)
    for wrong in (
        "0a" * 32,
        "sha256:" + "0A" * 32,
        "sha256:" + "0a" * 31,
        "sha256:" + "0a" * 33,
        "sha256:" + "0g" * 32,
        "SHA256:" + "0a" * 32,
    ):
        assert not matches(SHA256, wrong), wrong


@pytest.mark.parametrize(
    "value",
    [
        "example.com",
        "*.example.com",
        "*.com",
        "a.b.c.d",
        "1.2.3.a",
        "xn--bcher-kva.example",
        "A-1.Example",
        "a" * 63 + ".de",
        ".".join(["a"] * 127),
    ],
)
def test_fqdn(value: str) -> None:
    assert matches(FQDN, value)


@pytest.mark.parametrize(
    "value",
    [
        "",
        "example",
        "*",
        "10.0.0.1",
        "1.2",
        "2001:db8::1",
        "api.*.example.com",
        "*api.example.com",
        "*.*.com",
        "-bad.example.com",
        "bad-.example.com",
        "under_score.example.com",
        "example.com.",
        ".example.com",
        "a..b",
        "a" * 64 + ".de",
        ".".join(["ab"] * 85),
        "example.com\n",
        "exämple.com",
        "example.com:443",
    ],
)
def test_not_an_fqdn(value: str) -> None:
    assert not matches(FQDN, value)


@pytest.mark.parametrize("value", ["0.0.0", "1.2.3", "10.20.30", "1.2.0-rc.1", "1.0.0--"])
def test_semver(value: str) -> None:
    assert matches(SEMVER3, value)


@pytest.mark.parametrize(
    "value", ["", "1.0", "v1.0.0", "01.0.0", "1.00.0", "1.0.0-", "1.0.0+build", "1.0.0-a+b", "1.0.0.0", "1.0.٣", "1.0.0\n"]
)
def test_not_a_semver(value: str) -> None:
    assert not matches(SEMVER3, value)


@pytest.mark.parametrize(
    ("value", "reserved"),
    [
        ("acme", None),
        ("akmé-1_x", None),
        ("evil.tenant", "."),
        ("a*b.c", "*"),
        ("a>b", ">"),
        ("a b", " "),
        ("a\tb", "\t"),
        ("a\u00a0b", "\u00a0"),
        ("a\u3000b", "\u3000"),
        # White_Space of Unicode does not count the separators that str.isspace() does.
        ("a\x1cb", None),
    ],
)
def test_characters_that_divide_subjects(value: str, reserved: str | None) -> None:
    assert reserved_in_subjects(value) == reserved


def test_only_ascii_letters_change_case() -> None:
    # KELVIN SIGN: str.lower() makes it a k.
    assert ascii_lower("API.\u212aÄ") == "api.\u212aÄ"
