import copy
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents import ExecutionCell, canonical_spec_hash, parse_execution_cell, validate
from cellos.core.documents.forms import canonical_form, compact_form
from cellos.errors import InvalidSpec, SpecSyntaxError

GOLDEN = Path(__file__).parents[3] / "golden" / "documents"


def golden(kind: str) -> list[Any]:
    paths = sorted((GOLDEN / kind).glob("*.json"))
    assert paths, f"no golden documents in {GOLDEN / kind}"
    return [pytest.param(path, id=path.stem) for path in paths]


def stored_error(path: Path) -> str:
    return path.with_suffix(".error").read_text().removesuffix("\n")


@pytest.mark.parametrize("path", golden("valid"))
def test_valid_documents_are_accepted(path: Path) -> None:
    document = parse_execution_cell(path.read_bytes())
    validate(document)
    assert document.kind == "ExecutionCell"


@pytest.mark.parametrize("path", golden("malformed"))
def test_malformed_documents_get_one_line(path: Path) -> None:
    with pytest.raises(SpecSyntaxError) as caught:
        parse_execution_cell(path.read_bytes())
    assert str(caught.value) == stored_error(path)


@pytest.mark.parametrize("path", golden("rejected"))
def test_documents_that_break_a_rule_get_its_text(path: Path) -> None:
    with pytest.raises(InvalidSpec) as caught:
        parse_execution_cell(path.read_bytes())
    assert str(caught.value) == stored_error(path)
    assert not isinstance(caught.value, SpecSyntaxError)


@pytest.mark.parametrize(
    ("name", "digest"),
    [
        ("smallest", "fe898a34a5d3075edb0a3aaabf214db54c9cb4d976e0363a4768585e5ee7117b"),
        ("one-command", "e8255af5c572526ba830e0f228d02a03beb53adc2d33262c4d4b0fd1a49ed659"),
        ("complete", "21799026947fea89e4cdda00d4bf14ea14e5fb64f9691fce41ac3246e790c0b6"),
    ],
)
def test_digests_do_not_change(name: str, digest: str) -> None:
    document = parse_execution_cell((GOLDEN / "valid" / f"{name}.json").read_bytes())
    assert canonical_spec_hash(document.spec) == f"sha256:{digest}"


def test_values_arrive_where_they_belong() -> None:
    spec = parse_execution_cell((GOLDEN / "valid" / "complete.json").read_bytes()).spec
    assert spec.run is not None
    assert spec.run.limits is not None
    assert spec.run.limits.cpu_max is not None
    assert (spec.run.argv[0], spec.run.limits.cpu_max.quota_micros, spec.run.secret_delivery) == (
        "/opt/tides/bin/forecast",
        75_000,
        "runtimeBroker",
    )
    assert spec.authority.filesystem is not None
    assert [(m.source, m.target, m.mode) for m in spec.authority.filesystem.mounts] == [
        ("/opt/tides", "/opt/tides", "ro"),
        ("/srv/gauges", "/gauges", "rw"),
    ]
    assert spec.export is not None
    assert [type(target).__name__ for target in spec.export.targets or ()] == ["HttpTarget", "S3Target"]
    assert spec.authority.dns_authority is not None
    assert spec.authority.dns_authority.block_udp_http3


@pytest.mark.parametrize("path", golden("valid"))
def test_every_form_is_a_document_with_the_same_meaning(path: Path) -> None:
    document = parse_execution_cell(path.read_bytes())
    for form in (canonical_form(document), compact_form(document), msgspec.to_builtins(document)):
        again = parse_execution_cell(json.dumps(form).encode())
        assert again == document
        assert canonical_spec_hash(again.spec) == canonical_spec_hash(document.spec)


def test_unknown_members_pass_on_request_only() -> None:
    spec = b'{"id":"a","authority":{},"lifetime":{"ttlSeconds":1},"new":{"id":"b"}}'
    raw = b'{"apiVersion":"cellos.io/v1","kind":"ExecutionCell","spec":%b}' % spec
    with pytest.raises(SpecSyntaxError, match=r"spec\.new is not a known member"):
        parse_execution_cell(raw)
    assert parse_execution_cell(raw, allow_unknown_fields=True).spec.id == "a"
    with pytest.raises(SpecSyntaxError, match="is given more than once"):
        parse_execution_cell(raw.replace(b'"id":"b"', b'"id":1,"id":2'), allow_unknown_fields=True)
    with pytest.raises(InvalidSpec, match=r"spec\.id must match"):
        parse_execution_cell(raw.replace(b'"a"', b'"/"'), allow_unknown_fields=True)


def test_another_kind_of_document_is_told_before_its_shape() -> None:
    with pytest.raises(InvalidSpec, match="unsupported kind: Formation"):
        parse_execution_cell(b'{"apiVersion":"cellos.io/v1","kind":"Formation","members":[]}')
    with pytest.raises(SpecSyntaxError, match="apiVersion must be a string"):
        parse_execution_cell(b'{"apiVersion":1,"kind":[],"spec":{"id":"a","authority":{},"lifetime":{"ttlSeconds":1}}}')


# --- whatever comes, only our errors ------------------------------------------------------------------------------------------------------

VALID = [path.read_bytes() for path in sorted((GOLDEN / "valid").glob("*.json"))]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats(allow_nan=False)
    | st.text(max_size=12)
    | st.sampled_from(["/a", "a.example", "net.x", "http://h", "\0", "http", "s3"])
)
JSON_VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3), max_leaves=6
)


def parse(raw: bytes, *, loose: bool) -> None:
    """What every caller relies on: an error of ours on one line, or a document that stays valid when written and read again."""
    refused: InvalidSpec | None = None
    try:
        document = parse_execution_cell(raw, allow_unknown_fields=loose)
    except InvalidSpec as error:
        refused = error
    if refused:
        assert len(str(refused).splitlines()) == 1
        assert str(refused).startswith(("parse ExecutionCellDocument: ", "invalid cell specification: "))
        return
    validate(document)
    assert parse_execution_cell(msgspec.json.encode(document)) == document
    assert parse_execution_cell(json.dumps(compact_form(document)).encode()) == document


def places(value: object) -> list[list[Any]]:
    """The way to every value of a document."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, item in inner for rest in places(item))]


@given(st.data(), st.booleans())
def test_mutated_values(data: st.DataObject, loose: bool) -> None:
    value: Any = {"root": json.loads(data.draw(st.sampled_from(VALID)))}
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = ["root", *data.draw(st.sampled_from(places(value["root"])))]
        inner = value
        for parent in parents:
            inner = inner[parent]
        match data.draw(st.sampled_from(["replace", "remove", "copy"])):
            case "replace":
                inner[last] = data.draw(JSON_VALUES)
            case "remove" if parents:
                del inner[last]
            case "copy" if isinstance(inner, list):
                inner.append(copy.deepcopy(inner[last]))
    # An infinity, which floats may become here, is not JSON: that too must be told.
    parse(json.dumps(value["root"]).encode(), loose=loose)


@given(st.data(), st.booleans())
def test_mutated_bytes(data: st.DataObject, loose: bool) -> None:
    raw = bytearray(data.draw(st.sampled_from(VALID)))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw)))
        raw[at : at + data.draw(st.integers(0, 3))] = data.draw(
            st.binary(max_size=3) | st.sampled_from([b'"', b"}", b"[", b",", b"\\", b"9", b"null"])
        )
    parse(bytes(raw), loose=loose)


@given(JSON_VALUES)
def test_any_json(value: object) -> None:
    parse(json.dumps(value).encode(), loose=False)
    whole = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": value}
    parse(json.dumps(whole).encode(), loose=True)


def test_documents_made_in_python_are_validated_alike() -> None:
    document = parse_execution_cell(VALID[0])
    with pytest.raises(InvalidSpec):
        validate(msgspec.structs.replace(document, kind="Cell"))
    with suppress(AttributeError):
        document.kind = "Cell"  # type: ignore[misc]
    assert isinstance(document, ExecutionCell)
    assert document.kind == "ExecutionCell"
