"""The quick reading and the careful one are one reader: same values, same errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cellos.core.documents import careful, strict
from cellos.core.documents.strict import MAX_DOCUMENT_BYTES, OutOfRange
from cellos.errors import SpecSyntaxError

EXAMPLES = sorted((Path(__file__).parents[4] / "examples").glob("*.json"))


def exact(value: object) -> object:
    """A value whose `==` knows an int from a float or a bool, -0.0 from 0.0, and the order of members."""
    match value:
        case dict():
            return [(name, exact(inner)) for name, inner in value.items()]
        case list():
            return ("list", *map(exact, value))
        case OutOfRange():
            return ("out of range", value.digits)
        case _:
            return repr(value)


def answer(decode: Callable[[bytes], object], raw: bytes) -> object:
    try:
        return exact(decode(raw))
    except SpecSyntaxError as error:
        return str(error), error.line, error.column, error.path


def same(raw: bytes) -> None:
    assert answer(strict.decode, raw) == answer(careful.decode, raw)


NAMES = st.sampled_from(['"a"', '"b"', '"\\u0061"', '"a:b"', '"\\""', '"\\\\"', '"\\\\\\""', '"/"', '"\\/"', '""', '"é"', '"{"'])
SCALARS = st.sampled_from(
    [
        "null",
        "true",
        "false",
        "0",
        "-0",
        "1",
        "-1",
        "0.0",
        "-0.0",
        "1e5",
        "1E+2",
        "1e400",
        "-1e400",
        "1e-400",
        "18446744073709551615",
        "18446744073709551616",
        "-9223372036854775808",
        "-9223372036854775809",
        "NaN",
        "Infinity",
        "-Infinity",
        "01",
        "+1",
        ".5",
        "1.",
        "-",
        "0x1",
        "1_0",
        "tru",
        "nul",
    ]
) | st.sampled_from(["9" * 40, '"\\ud83d\\ude00"', '"\\ud83d"', '"\\udc00x"', '"\\x"', '"\t"', '"\x7f"', '"\\b\\n"', "''"])
BLANKS = st.sampled_from(["", "", "", " ", "\n", "\r\n\t", "\x0c", "\ufeff"])


def objects(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    member = st.tuples(NAMES, BLANKS, st.sampled_from([":", ":", ": ", ""]), inner).map("".join)
    return st.lists(member, max_size=4).map(lambda members: "{" + ",".join(members) + "}")


def arrays(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(st.tuples(BLANKS, inner, BLANKS).map("".join), max_size=4).map(lambda items: "[" + ",".join(items) + "]")


DOCUMENTS = st.recursive(NAMES | SCALARS, lambda inner: objects(inner) | arrays(inner), max_leaves=12)
PIECES = st.sampled_from(
    [b"", b'"', b"\\", b":", b",", b"{", b"}", b"[", b"]", b"\\u", b"\\ud800", b"\x00", b"\xff", b"\xc3\xa9", b"0", b"e", b" x"]
)


@given(DOCUMENTS)
def test_documents(text: str) -> None:
    same(text.encode())


@given(DOCUMENTS, st.lists(st.tuples(st.integers(0, 200), st.integers(0, 3), PIECES), min_size=1, max_size=3))
def test_documents_with_faults(text: str, faults: list[tuple[int, int, bytes]]) -> None:
    raw = text.encode()
    for place, length, piece in faults:
        raw = raw[:place] + piece + raw[place + length :]
    same(raw)


@given(st.binary(max_size=60) | st.text('[]{}",:\\u0dNaInfty19.-+e \n\x00é', max_size=60).map(str.encode))
@example(b"")
@example(b"\xef\xbb\xbf{}")
@example(b"{} {}")
def test_any_bytes(raw: bytes) -> None:
    same(raw)


TEXTS = st.text(st.sampled_from('":\\{}[],/u0061 \n'), max_size=12)


def members(value: object) -> int:
    if isinstance(value, dict):
        return len(value) + sum(map(members, value.values()))
    return sum(map(members, value)) if isinstance(value, list) else 0


@given(st.recursive(TEXTS | st.integers() | st.none(), lambda inner: st.lists(inner) | st.dictionaries(TEXTS, inner)))
def test_strings_that_look_like_documents(value: object) -> None:
    raw = json.dumps(value).encode()
    same(raw)
    assert strict._members_in(raw) == members(value)


@pytest.mark.parametrize("depth", [126, 127, 128, 129, 130, 400])
@pytest.mark.parametrize(
    ("opening", "inside", "closing"), [(b"[", b"", b"]"), (b"[", b"1", b"]"), (b'{"a":', b"{}", b"}"), (b"[", b'{"a":1,"a":2}', b"]")]
)
def test_nesting(depth: int, opening: bytes, inside: bytes, closing: bytes) -> None:
    same(opening * depth + inside + closing * depth)


@pytest.mark.parametrize(
    "unit", [b"x", b':\\"', b"\\\\", b'\\\\\\":', b'",":', b"[", b'{"":', b"9", b"1,", b"\xc3\xa9", b"\\u0041"], ids=repr
)
@pytest.mark.parametrize("frame", [(b'"', b'"'), (b"[0,", b"0]"), (b'{"a":"', b'"}'), (b"", b"")], ids=repr)
def test_the_largest_documents(unit: bytes, frame: tuple[bytes, bytes]) -> None:
    start, end = frame
    for size in (MAX_DOCUMENT_BYTES, MAX_DOCUMENT_BYTES + 1):
        count = (size - len(start) - len(end)) // len(unit)
        same((start + unit * count + end).ljust(size))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_usual_documents_are_read_quickly(path: Path) -> None:
    script = (
        "import sys; from cellos.core.documents import parse_execution_cell; parse_execution_cell(sys.stdin.buffer.read());"
        "assert not {'json', 'cellos.core.documents.careful'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], input=path.read_bytes(), check=True)
