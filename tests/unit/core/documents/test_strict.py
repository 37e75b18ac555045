import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents.strict import MAX_DOCUMENT_BYTES, OutOfRange, decode
from cellos.errors import SpecSyntaxError


def refusal(raw: bytes) -> SpecSyntaxError:
    with pytest.raises(SpecSyntaxError) as caught:
        decode(raw)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("parse ExecutionCellDocument: ")
    return caught.value


@pytest.mark.parametrize(
    ("raw", "line", "column", "words"),
    [
        (b'{\n  "a": }', 2, 8, "expecting value"),
        (b'{"a" 1}', 1, 6, "expecting ':' delimiter"),
        (b"[1 2]", 1, 4, "expecting ',' delimiter"),
        (b"[1, 01]", 1, 6, "expecting ',' delimiter"),
        (b"['a']", 1, 2, "expecting value"),
        (b"{a: 1}", 1, 2, "expecting property name enclosed in double quotes"),
        (b'["tab\there"]', 1, 6, "invalid control character"),
        (b'["\\x"]', 1, 3, "invalid \\escape"),
        (b'["abc', 1, 2, "unterminated string"),
        (b"[1] x", 1, 5, "there is text after the end of the document"),
        (b"[1]\n\n[2]", 3, 1, "there is text after the end of the document"),
        (b"[1", 1, 3, "the document ends too early"),
        (b'{"a": 1,\n', 2, 1, "the document ends too early"),
        (b"[1, NaN]", 1, 5, "NaN is not a JSON value"),
        (b'["NaN", \n -Infinity]', 2, 2, "-Infinity is not a JSON value"),
        (b'["a\\"Infinity", Infinity]', 1, 17, "Infinity is not a JSON value"),
        (b'\xef\xbb\xbf{"a": 1}', 1, 1, "the document starts with a byte order mark: save it as UTF-8 without one"),
        (b'{\n"a": "\xc3\xa9\xff"}', 2, 8, "byte 0xff is not UTF-8"),
        (b'["\xed\xa0\x80"]', 1, 3, "byte 0xed is not UTF-8"),
        ('{"a": "x"}'.encode("utf-16-le"), 1, 2, "expecting property name enclosed in double quotes"),
        (b'["\\ud83d\\ude00", \n"\\ud83d"]', 2, 1, "a string holds half of a surrogate pair, which is no character"),
        (b'{"\\uDC00": 1}', 1, 2, "a string holds half of a surrogate pair, which is no character"),
        (b"[" * 129 + b"]" * 129, 1, 129, "the document is nested more than 128 levels deep"),
        (b"[" * 200_000, 1, 129, "the document is nested more than 128 levels deep"),
        (b'{"a":' * 150_000, 1, 641, "the document is nested more than 128 levels deep"),
        (b"\x00", 1, 1, "expecting value"),
    ],
)
def test_syntax_errors_have_line_and_column(raw: bytes, line: int, column: int, words: str) -> None:
    error = refusal(raw)
    assert error.text == f"line {line} column {column}: {words}"
    assert (error.line, error.column) == (line, column)


def test_a_trailing_comma_is_refused_on_its_line() -> None:
    # Python's words and column for it differ by version.
    assert refusal(b'{"a": 1,\n "b": [1, 2,],\n}').line == 2


@pytest.mark.parametrize("raw", [b"", b" \n\t\r "])
def test_an_empty_document(raw: bytes) -> None:
    assert refusal(raw).text == "the document is empty"


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b'{"a": 1, "a": 1}', "a"),
        (b'{"spec": {"run": {"argv": [], "x": {}, "argv": []}}}', "spec.run.argv"),
        (b'{"l": [1, {"k": 1}, {"k": 1, "k": 2}]}', "l[2].k"),
        (b'{"labels": {"two words": "a", "two words": "b"}}', 'labels["two words"]'),
        (b'{"a": {"b": 1, "b": 1}, "a": {}}', "a.b"),
        (b'{"a": NaN, "b": {"c": 1, "\\u0063": 2}}', None),
        (b'{"": 1, "": 2}', '[""]'),
    ],
)
def test_duplicate_members_are_named(raw: bytes, path: str | None) -> None:
    error = refusal(raw)
    if path is None:
        assert error.text == "line 1 column 7: NaN is not a JSON value"
    else:
        assert error.text == f"{path} is given more than once"
        assert error.path == path


def test_a_duplicate_before_a_syntax_error_is_one_error() -> None:
    assert refusal(b'[{"a": 1, "a": 2}, oops]').text == "line 1 column 20: expecting value"


def test_a_duplicate_in_the_deep_is_one_error() -> None:
    assert "nested more than 128" in refusal(b"[" * 900 + b'{"a": 1, "a": 2}' + b"]" * 900).text


def test_size_is_limited_before_anything_is_read() -> None:
    at_most = b'"' + b"x" * (MAX_DOCUMENT_BYTES - 2) + b'"'
    assert decode(at_most) == "x" * (MAX_DOCUMENT_BYTES - 2)
    for raw in (at_most + b" ", b"\xff" * (MAX_DOCUMENT_BYTES + 1), b"[" * 100_000_000):
        assert refusal(raw).text == "the document is larger than 1048576 bytes, the most that is read"


def test_nesting_up_to_the_limit_is_read() -> None:
    value = decode(b"[" * 128 + b"]" * 128)
    depth = 0
    while isinstance(value, list):
        value, depth = (value[0] if value else None), depth + 1
    assert depth == 128
    # Brackets in strings are not nesting.
    assert decode(json.dumps("[{" * 1000).encode()) == "[{" * 1000
    assert decode(b"[" + b"[]," * 500 + b"[]]") == [[]] * 501


@pytest.mark.parametrize(("raw", "value"), [(b"18446744073709551615", 2**64 - 1), (b"-9223372036854775808", -(2**63)), (b"0", 0)])
def test_64_bit_integers_are_read(raw: bytes, value: int) -> None:
    assert decode(raw) == value


@pytest.mark.parametrize("raw", [b"18446744073709551616", b"-9223372036854775809", b"9" * 5000, b"1" * 1_000_000])
def test_larger_integers_become_what_no_member_accepts(raw: bytes) -> None:
    assert isinstance(decode(raw), OutOfRange)


def test_larger_integers_are_described_shortly() -> None:
    assert str(decode(b"18446744073709551616")) == "the integer 18446744073709551616"
    assert str(decode(b"9" * 5000)) == "an integer of 5000 digits"


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
)


@given(JSON_VALUES, st.booleans())
def test_every_json_value_comes_back(value: object, ascii_only: bool) -> None:
    assert decode(json.dumps(value, ensure_ascii=ascii_only).encode()) == value


@given(st.binary(max_size=200) | st.text('[]{}",:\\ud8NaInfty0123456789.-+e \n\x00é').map(str.encode))
def test_no_bytes_raise_anything_else(raw: bytes) -> None:
    with contextlib.suppress(SpecSyntaxError):
        decode(raw)
