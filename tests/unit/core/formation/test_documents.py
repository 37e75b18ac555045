import copy
import json
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.formation import Formation, Member, document_has_specs, parse_formation
from cellos.core.formation.documents import read_formation
from cellos.core.formation.options import FORMATION_OPTIONS, MEMBER_OPTIONS
from cellos.errors import FormationRejected

ROOT = Path(__file__).parents[4]
GOLDEN = ROOT / "tests/golden/formations"
EXAMPLES = ROOT / "examples/formations"
SPEC: dict[str, Any] = {"authority": {}, "lifetime": {"ttlSeconds": 60}}
FLAT: dict[str, Any] = {"name": "demo", "coordinator": "a", "members": [{"id": "a"}, {"id": "b", "authorizedBy": "a"}]}
KUBECTL: dict[str, Any] = {
    "apiVersion": "cellos.dev/v1",
    "kind": "Formation",
    "metadata": {"name": "demo"},
    "spec": {"coordinator": "a", "members": [{"name": "a"}, {"name": "b", "authorizedBy": "a"}]},
}


def golden(kind: str) -> list[Any]:
    paths = sorted((GOLDEN / kind).glob("*.json"))
    assert paths, f"no golden documents in {GOLDEN / kind}"
    return [pytest.param(path, id=path.stem) for path in paths]


def parse(value: object, syntax: Literal["json", "yaml"] = "json") -> Formation:
    return parse_formation(json.dumps(value).encode(), syntax=syntax)


def refusal(value: object) -> str:
    with pytest.raises(FormationRejected) as caught:
        parse(value)
    text: str = caught.value.problem.detail
    return text


@pytest.mark.parametrize("path", golden("malformed"))
def test_malformed_documents_get_their_problem(path: Path) -> None:
    with pytest.raises(FormationRejected) as caught:
        parse_formation(path.read_bytes())
    found = caught.value.problem
    assert f"{found.type} {found.status}\n{found.detail}\n" == path.with_suffix(".error").read_text()


@pytest.mark.parametrize("path", golden("valid"))
def test_what_is_kept_of_valid_documents(path: Path) -> None:
    document = parse_formation(path.read_bytes()).document
    assert json.dumps(document, indent=2, ensure_ascii=False) + "\n" == path.with_suffix(".flat").read_text()


@pytest.mark.parametrize("path", golden("valid"))
def test_what_is_kept_can_be_sent_again(path: Path) -> None:
    once = parse_formation(path.read_bytes())
    for syntax in ("json", "yaml"):
        assert parse(once.document, syntax) == once  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["external", "word-count"])
def test_examples_are_the_same_in_both_shapes(name: str) -> None:
    flat = parse_formation((EXAMPLES / f"{name}.json").read_bytes())
    assert flat == parse_formation((EXAMPLES / f"{name}.yaml").read_bytes(), syntax="yaml")
    assert flat.has_specs is document_has_specs(flat.document) is (name == "word-count")


def test_a_formation_knows_what_was_written() -> None:
    formation = parse(KUBECTL)
    assert (formation.name, formation.coordinator, formation.has_specs) == ("demo", "a", False)
    assert formation.members == (Member(id="a"), Member(id="b", authorized_by="a"))
    assert formation.document == FLAT


def test_labels_and_annotations_are_kept_and_nothing_else_of_the_envelope() -> None:
    kept = {"labels": {"team": "tides"}, "annotations": {"why": ["x"]}}
    assert parse({**KUBECTL, "metadata": {"name": "demo", **kept}}).document == {**FLAT, "metadata": kept}
    assert "metadata" not in parse(KUBECTL).document


def test_what_only_a_kubectl_document_can_have_is_never_dropped_in_silence() -> None:
    assert parse({**KUBECTL, "spec": {**KUBECTL["spec"], "deadline": "P1D"}}).document == {**FLAT, "deadline": "P1D"}
    assert "namespace" in refusal({**KUBECTL, "metadata": {"name": "demo", "namespace": "x"}})
    assert "unknown top-level" in refusal({**KUBECTL, "status": {}})


@pytest.mark.parametrize("field", ["apiVersion", "kind"])
def test_another_version_or_kind_is_named(field: str) -> None:
    text = refusal({**KUBECTL, field: "other"})
    assert field in text
    assert "other" in text


def test_a_member_of_both_shapes_is_hybrid() -> None:
    for field in ("apiVersion", "kind", "metadata", "spec"):
        assert refusal({**FLAT, field: KUBECTL[field]}).startswith("hybrid formation document: ")
    for field in ("name", "coordinator", "members"):
        assert refusal({**KUBECTL, field: FLAT[field]}).startswith(f'hybrid formation document: top-level flat field(s) ["{field}"]')


def test_the_syntax_is_named() -> None:
    with pytest.raises(FormationRejected, match="invalid yaml: line 1 column 1: "):
        parse_formation(b"*x", syntax="yaml")
    with pytest.raises(FormationRejected, match="invalid yaml: missing field `name`"):
        parse_formation(b"x: 1", syntax="yaml")


FAULTS: list[tuple[str, dict[str, Any]]] = [
    ("invalid json: name is given more than once", {"name": "-"}),
    ("hybrid", {"kind": "x"}),
    ("invalid json: missing field `coordinator`", {"coordinator": ...}),
    ("formation name", {"name": "-"}),
    ("coordinator 'z' must appear", {"coordinator": "z"}),
    ("member 'b' has a spec and member 'a' has none", {"members": [{"id": "a"}, {"id": "b", "authorizedBy": "a", "spec": SPEC}]}),
]


def test_the_first_of_many_faults_is_told() -> None:
    """Documents with all faults, from which the first is taken away one by one."""
    for at, (text, _) in enumerate(FAULTS):
        value = dict(FLAT)
        for _, members in reversed(FAULTS[at:]):
            value |= members
        raw = json.dumps({name: item for name, item in value.items() if item is not ...})
        if at == 0:
            raw = raw[:-1] + ', "name": "-"}'
        with pytest.raises(FormationRejected) as caught:
            parse_formation(raw.encode())
        assert caught.value.text.startswith(text)


def test_structure_comes_before_specs_and_specs_before_narrowing() -> None:
    lead, work = {"id": "a", "spec": SPEC}, {"id": "b", "authorizedBy": "a", "spec": {**SPEC, "lifetime": {"ttlSeconds": 61}}}
    bad = {"id": "c", "authorizedBy": "c", "spec": {}}
    assert "cycle" in refusal({**FLAT, "members": [lead, work, bad]})
    assert "members[2].spec.authority" in refusal({**FLAT, "members": [lead, work, {**bad, "authorizedBy": "a"}]})
    assert "exceeds its parent" in refusal({**FLAT, "members": [lead, work]})


@pytest.mark.parametrize(
    ("document", "has"),
    [
        (FLAT, False),
        ({**FLAT, "members": [{"id": "a", "spec": None}]}, False),
        ({**FLAT, "members": [{"id": "a", "spec": SPEC}]}, True),
        ({**FLAT, "members": [{"id": "a", "use": "x"}]}, True),
        ({"members": "x"}, False),
        ({"members": ["x"]}, False),
        ({}, False),
        (None, False),
        (["x"], False),
    ],
)
def test_specs_of_a_kept_document(document: object, has: bool) -> None:
    assert document_has_specs(document) is has


def test_settings_of_a_formation() -> None:
    members = [{"id": "a", "spec": SPEC}]
    plain = parse({**FLAT, "members": members})
    assert (plain.deadline_seconds, plain.on_disconnect) == (2_592_000, "kill")
    given = parse({**FLAT, "members": members, "deadlineSeconds": 60, "onDisconnect": "finish"})
    assert (given.deadline_seconds, given.on_disconnect) == (60, "finish")


def test_narrowing_looks_at_what_a_template_says() -> None:
    members = [{"id": "a", "spec": SPEC}, {"id": "b", "authorizedBy": "a", "use": "t"}]
    wide = {"t": {**SPEC, "lifetime": {"ttlSeconds": 61}}}
    assert refusal({**FLAT, "members": members, "templates": wide}).startswith(
        "member 'b' exceeds its parent 'a': spec.lifetime.ttlSeconds '61'"
    )
    assert parse({**FLAT, "members": members, "templates": {"t": SPEC}}).has_specs


def test_order_comes_between_specs_and_narrowing() -> None:
    lead, wide = {"id": "a", "spec": SPEC}, {"id": "b", "authorizedBy": "a", "spec": {**SPEC, "lifetime": {"ttlSeconds": 61}}}
    assert "retries" in refusal({**FLAT, "members": [lead | {"after": ["x"]}, wide | {"retries": "x"}]})
    assert "no member" in refusal({**FLAT, "members": [lead | {"after": ["x"]}, wide]})


@pytest.mark.parametrize("path", golden("valid"))
def test_a_kept_document_is_read_as_it_was_admitted(path: Path) -> None:
    admitted = parse_formation(path.read_bytes())
    assert read_formation(admitted.document) == admitted


def test_narrowing_was_judged_when_it_was_admitted() -> None:
    members = [{"id": "a", "spec": SPEC}, {"id": "b", "authorizedBy": "a", "spec": {**SPEC, "lifetime": {"ttlSeconds": 61}}}]
    assert read_formation({**FLAT, "members": members}).has_specs


@pytest.mark.parametrize("document", [{}, {**FLAT, "members": []}, {**FLAT, "members": [{"id": "a", "use": "x"}]}, {**FLAT, "members": 1}])
def test_a_kept_document_that_nobody_could_run(document: dict[str, Any]) -> None:
    with pytest.raises(FormationRejected):
        read_formation(document)


# --- whatever comes ----------------------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False) | TEXT,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(TEXT, inner, max_size=2),
    max_leaves=4,
)
TAKEN = {"name", "coordinator", "members", "apiVersion", "kind", "metadata", "spec"}
MEMBER_KEYS = {"id", "name", "authorizedBy", "spec", "use"}
EXTRAS = st.dictionaries(TEXT.filter(lambda name: name not in TAKEN), VALUES, max_size=2)
MEMBER_EXTRAS = st.dictionaries((TEXT | st.just("retries")).filter(lambda name: name not in MEMBER_KEYS), VALUES, max_size=2)
METADATA = st.dictionaries(st.sampled_from(["labels", "annotations"]), st.dictionaries(TEXT, VALUES, max_size=2))


@st.composite
def twins(draw: st.DrawFn) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same formation in both shapes."""
    ids = draw(st.lists(TEXT, min_size=1, max_size=4, unique=True))
    members = []
    for at, each in enumerate(ids):
        parent = {} if at == 0 else {"authorizedBy": ids[draw(st.integers(0, at - 1))]}
        members.append((each, parent | draw(MEMBER_EXTRAS)))
    order = draw(st.permutations(members))
    name, extras, metadata = draw(st.from_regex("[a-z][a-z0-9._-]{0,8}[a-z]", fullmatch=True)), draw(EXTRAS), draw(METADATA)
    flat = {"name": name, "coordinator": ids[0], "members": [{"id": each, **more} for each, more in order], **extras}
    spec = {"coordinator": ids[0], "members": [{"name": each, **more} for each, more in order], **extras}
    kubectl = {"apiVersion": "cellos.dev/v1", "kind": "Formation", "metadata": {"name": name, **metadata}, "spec": spec}
    return flat | ({"metadata": metadata} if metadata else {}), kubectl


@given(twins())
def test_both_shapes_are_one_formation(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    flat, kubectl = map(parse, pair)
    assert flat == kubectl
    assert flat.document == pair[0]


@given(twins())
def test_normalising_twice_changes_nothing(pair: tuple[dict[str, Any], dict[str, Any]]) -> None:
    once = parse(pair[1])
    assert parse(once.document) == once


VALID = [json.loads(path.read_text()) for path in sorted((GOLDEN / "valid").glob("*.json"))]


def places(value: object) -> list[list[Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [[], *([key, *rest] for key, item in inner for rest in places(item))]


@given(st.data())
def test_mutated_documents_are_taken_or_refused_in_one_line(data: st.DataObject) -> None:
    value: Any = {"root": copy.deepcopy(data.draw(st.sampled_from(VALID)))}
    for _ in range(data.draw(st.integers(1, 3))):
        *parents, last = ["root", *data.draw(st.sampled_from(places(value["root"])))]
        inner = value
        for parent in parents:
            inner = inner[parent]
        match data.draw(st.sampled_from(["replace", "remove", "add"])):
            case "replace":
                inner[last] = data.draw(VALUES)
            case "remove" if parents:
                del inner[last]
            case "add" if isinstance(inner[last], dict):
                inner[last][data.draw(st.sampled_from(sorted(TAKEN | MEMBER_KEYS | {*MEMBER_OPTIONS, *FORMATION_OPTIONS})))] = data.draw(
                    VALUES
                )
    refused: FormationRejected | None = None
    try:
        once = parse(value["root"])
    except FormationRejected as error:
        refused = error
    if refused:
        assert refused.problem.status == 400
        assert refused.text.isprintable()
    else:
        assert parse(once.document) == once
