import contextlib
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from cellos.core.documents import parse_execution_cell, strict
from cellos.core.documents.parse import syntax_of
from cellos.core.documents.strict import MAX_DOCUMENT_BYTES, OutOfRange
from cellos.core.documents.yaml import decode
from cellos.errors import InvalidSpec, SpecSyntaxError

GOLDEN = Path(__file__).parents[3] / "golden" / "documents"
EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.fixture(params=["C", "Python"])
def parser(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both parsers that PyYAML may have."""
    if request.param == "C" and not yaml.__with_libyaml__:
        pytest.skip("PyYAML was built without libyaml")
    monkeypatch.setattr(yaml, "__with_libyaml__", request.param == "C")
    return str(request.param)


def refusal(raw: bytes) -> SpecSyntaxError:
    with pytest.raises(SpecSyntaxError) as caught:
        decode(raw)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("parse ExecutionCellDocument: ")
    return caught.value


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize(
    ("text", "value"),
    [
        *((word, None) for word in ("~", "null", "Null", "NULL", "---", "--- # nothing\n...")),
        *((word, True) for word in ("true", "True", "TRUE")),
        *((word, False) for word in ("false", "False", "FALSE")),
        *((word, word) for word in ("yes", "Yes", "no", "NO", "on", "off", "y", "n", "tRUE", "nULL", "None")),
        *(
            (word, word)
            for word in ("2026-05-01", "2026-05-01T10:00:00Z", "1:30", "190:20:30", "1_000", "0b1", "0o8", "-0x1", "+0o7", "=", ".")
        ),
        ("0", 0),
        ("-0", 0),
        ("+12", 12),
        ("017", 17),
        ("0o17", 15),
        ("0xfF", 255),
        ("18446744073709551615", 2**64 - 1),
        ("-9223372036854775808", -(2**63)),
        ("0xffffffffffffffff", 2**64 - 1),
        ("0" * 5000 + "7", 7),
        ("1.", 1.0),
        (".5", 0.5),
        ("-1.5e3", -1500.0),
        ("1e3", 1000.0),
        ("12e03", 12000.0),
        ("'12'", "12"),
        ('"true"', "true"),
        ("|\n  12\n", "12\n"),
        (">-\n  a\n  b\n", "a b"),
        ("''", ""),
        ('"\\x41\\u00e9\\U0001F600\\e\\/\\N"', "Aé\U0001f600\x1b/\x85"),
        ("'<<'", "<<"),
        ("[]", []),
        ("{}", {}),
        ("- 1\n- [2, {a: 3}]\n-\n", [1, [2, {"a": 3}], None]),
        ("a:\n- b\nc: {d: e, 'f g': }\n", {"a": ["b"], "c": {"d": "e", "f g": None}}),
        ("'<<': 1\n? a\n", {"<<": 1, "a": None}),
        ("é: ü # comment\r\nb: c\r\n", {"é": "ü", "b": "c"}),
    ],
)
def test_the_core_schema_of_yaml_1_2(text: str, value: object) -> None:
    found = decode(text.encode())
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    "text", ["18446744073709551616", "-9223372036854775809", "9" * 5000, "0x1" + "0" * 16, "0o2" + "0" * 21, "0o" + "7" * 5000]
)
def test_larger_integers_become_what_no_member_accepts(text: str) -> None:
    assert isinstance(decode(text.encode()), OutOfRange)
    assert len(str(decode(text.encode()))) < 60


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("path", sorted((GOLDEN / "yaml" / "malformed").glob("*.yaml")), ids=lambda path: path.stem)
def test_malformed_documents_get_one_line(path: Path, parser: str) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_execution_cell(path.read_bytes(), syntax="yaml")
    found, stored = str(caught.value), path.with_suffix(".error").read_text().removesuffix("\n")
    if parser == "Python" and " escape" in stored:
        # It looks at an escape as a whole, and does not say where.
        found, stored = (text.rpartition(": ")[2] for text in (found, stored))
    assert found == stored


@pytest.mark.usefixtures("parser")
def test_a_document_in_yaml_is_the_document_in_json() -> None:
    spec = parse_execution_cell((GOLDEN / "yaml" / "valid" / "complete.yaml").read_bytes(), syntax="yaml").spec
    assert spec.id == "tides.2026-05"
    assert spec.lifetime.ttl_seconds == 60
    assert spec.correlation is not None
    assert (spec.correlation.tenant_id, spec.correlation.external_run_id) == ("no", "2026-05-01")
    assert spec.correlation.labels == {"on": "yes", "season": "~word", "time": "1:30", "empty": "", "quoted": "a\tbé"}
    assert spec.run is not None
    assert spec.run.argv == ("/bin/sh", "-c", 'set -e\necho "line one"\necho two: 2\n', "folded into one line", "it's", "{$}[]")


@pytest.mark.parametrize(
    ("raw", "line", "column"),
    [
        (b"a: 1\nb: {c: 1,\n  c: 2}\n", 3, 3),
        (b"\ta: 1", 1, 1),
        (b"a: &x 1", 1, 4),
        (b"a: .nan", 1, 4),
        (b"a: 'b\n", 2, 1),
        (b"a: \x07", 1, 4),
    ],
)
def test_errors_have_line_and_column(raw: bytes, line: int, column: int) -> None:
    error = refusal(raw)
    assert (error.line, error.column) == (line, column)
    assert error.text.startswith(f"line {line} column {column}: ")


@pytest.mark.parametrize(
    ("raw", "path"),
    [
        (b"a: 1\na: 1", "a"),
        (b"spec: {run: {argv: [], x: {}, argv: []}}", "spec.run.argv"),
        (b"l: [1, {k: 1}, {k: 1, 'k': 2}]", "l[2].k"),
        (b"labels:\n  two words: a\n  ? two words\n  : b\n", 'labels["two words"]'),
        (b"- - {a: 1, a: 2}", "[0][0].a"),
    ],
)
def test_duplicate_members_are_named(raw: bytes, path: str) -> None:
    error = refusal(raw)
    assert error.text.endswith(f": {path} is given more than once")
    assert error.path == path


def test_size_is_limited_before_anything_is_read() -> None:
    assert decode(b"x" * MAX_DOCUMENT_BYTES) == "x" * MAX_DOCUMENT_BYTES
    assert refusal(b"[" * (MAX_DOCUMENT_BYTES + 1)).text == "the document is larger than 1048576 bytes, the most that is read"


def test_nesting_up_to_the_limit_is_read() -> None:
    value, depth = decode(b"- " * 128 + b"x"), 0
    while isinstance(value, list):
        value, depth = value[0], depth + 1
    assert (value, depth) == ("x", 128)
    assert decode(b"[" + b"[]," * 500 + b"[]]") == [[]] * 501


# --- the same value as in JSON ------------------------------------------------------------------------------------------------------------


def is_read_alike(text: str) -> bool:
    """PyYAML writes YAML 1.1: what is a number only in YAML 1.2 it leaves without quotes."""
    return not text or decode(yaml.safe_dump([text], allow_unicode=False).encode()) == [text]


TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS.filter(is_read_alike)
    | st.sampled_from(
        [
            "yes",
            "no",
            "null",
            "~",
            "1_000",
            "0b1",
            "1:30",
            "2026-05-01",
            "<<",
            "=",
            "&a",
            "*a",
            "!t",
            "- a",
            "a: b",
            "#",
            "\t",
            "\u2028",
            "\x85",
            "\ufeff",
        ]
    )
)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS.filter(is_read_alike), inner, max_size=4), max_leaves=12
)


@given(JSON_VALUES, st.booleans(), st.booleans())
@example({"a": [{"b": [[], {}, ""]}, -0.0, 1e300, 5e-324]}, False, True)
@example({"two\nlines": "a\n\n b\n", " ": "\n", "": "'\""}, True, False)
def test_every_json_document_comes_back_from_yaml(value: object, flow: bool, unicode: bool) -> None:
    raw = json.dumps(value).encode()
    written = yaml.safe_dump(strict.decode(raw), default_flow_style=flow, allow_unicode=unicode)
    if re.search("[\x85\u2028\u2029]", written):
        # In single quotes, where only YAML 1.1 knows them as line breaks.
        assert "can only be written as an escape" in refusal(written.encode()).text
        return
    found = decode(written.encode())
    assert found == strict.decode(raw)
    # 1 is not 1.0, nor true.
    assert json.dumps(found, sort_keys=True) == json.dumps(strict.decode(raw), sort_keys=True)


@pytest.mark.parametrize("path", sorted((GOLDEN / "valid").glob("*.json")), ids=lambda path: path.stem)
def test_golden_documents_mean_the_same_in_yaml(path: Path) -> None:
    written = yaml.safe_dump(json.loads(path.read_text()), sort_keys=False).encode()
    assert parse_execution_cell(written, syntax="yaml") == parse_execution_cell(path.read_bytes())


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_an_example_in_yaml_is_the_one_in_json(path: Path) -> None:
    assert parse_execution_cell(path.read_bytes(), syntax="yaml") == parse_execution_cell(path.with_suffix(".json").read_bytes())


@pytest.mark.usefixtures("parser")
@pytest.mark.parametrize("path", sorted((GOLDEN / "valid").glob("*.json")), ids=lambda path: path.stem)
def test_json_is_yaml(path: Path) -> None:
    if "\\ud" in path.read_text():
        # Two escapes that are one character in JSON are two halves in YAML.
        with pytest.raises(SpecSyntaxError, match="write the character itself"):
            decode(path.read_bytes())
    else:
        assert parse_execution_cell(path.read_bytes(), syntax="yaml") == parse_execution_cell(path.read_bytes())


@given(
    st.binary(max_size=100) | st.text("-?:,[]{}#&*!|>'\"%@`~<.0o1xe+_a \t\n\\uUd8\x85\u2028é", max_size=60).map(str.encode), st.booleans()
)
def test_no_bytes_raise_anything_else(raw: bytes, in_c: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(yaml, "__with_libyaml__", in_c and yaml.__with_libyaml__)
        with contextlib.suppress(SpecSyntaxError):
            value = decode(raw)
            json.dumps(value, default=str, allow_nan=False).encode()


# --- which syntax -------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "raw", "syntax"),
    [
        ("a.yaml", b"{}", "yaml"),
        ("A.YML", b"{}", "yaml"),
        ("a.json", b"a: 1", "json"),
        ("a.JSON", b"", "json"),
        ("-", b' \r\n\t{"a": 1}', "json"),
        ("-", b"a: {}", "yaml"),
        ("-", b"# {\n{}", "yaml"),
        ("-", b"", "yaml"),
        ("/dev/fd/63", b"{", "json"),
        ("spec", b"---\n", "yaml"),
        ("a.yaml.json", b"a: 1", "json"),
    ],
)
def test_the_syntax_is_told_by_name_then_by_the_first_byte(name: str, raw: bytes, syntax: str) -> None:
    assert syntax_of(name, raw) == syntax


def test_reading_json_does_not_import_yaml() -> None:
    script = """
import sys
from cellos.core.documents import parse_execution_cell
parse_execution_cell(b'{"apiVersion":"cellos.io/v1","kind":"ExecutionCell","spec":{"id":"a","authority":{},"lifetime":{"ttlSeconds":1}}}')
import cellos.core.documents.yaml
sys.exit("yaml" in sys.modules)
"""
    done: subprocess.CompletedProcess[Any] = subprocess.run([sys.executable, "-c", script], check=False)
    assert done.returncode == 0
