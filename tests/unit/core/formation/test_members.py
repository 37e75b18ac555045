import json
from typing import Any

import pytest

from cellos.core.documents import parse_execution_cell
from cellos.core.formation.members import Member, cell_id, read_members
from cellos.core.formation.options import Backoff
from cellos.errors import FormationRejected

SPEC: dict[str, Any] = {"run": {"argv": ["/bin/true"]}, "authority": {}, "lifetime": {"ttlSeconds": 60}}


def refusal(*entries: dict[str, Any]) -> str:
    with pytest.raises(FormationRejected) as caught:
        read_members(entries)
    assert (caught.value.problem.type, caught.value.problem.status) == ("/problems/bad-request", 400)
    return caught.value.text


def test_without_specs_any_id_will_do_and_nothing_else_is_read() -> None:
    entries = [{"id": ""}, {"id": "a b", "authorizedBy": "", "pool": 5, "spec": None}]
    assert read_members(entries) == (Member(id=""), Member(id="a b", authorized_by=""))


def test_a_spec_is_that_of_an_execution_cell_without_its_id() -> None:
    member = read_members([{"id": "a", "spec": SPEC}])[0]
    assert member.spec is not None
    cell = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": "a", **SPEC}}
    assert member.spec == parse_execution_cell(json.dumps(cell).encode()).spec
    assert cell_id("018f6f0e-0000-7000-8000-000000000001", "a") == "018f6f0e-0000-7000-8000-000000000001.a"


def test_a_template_is_a_spec_with_a_name() -> None:
    entries = [
        {"id": "a", "use": "t"},
        {"id": "b", "authorizedBy": "a", "spec": SPEC, "use": None},
        {"id": "c", "authorizedBy": "a", "use": "t"},
    ]
    a, b, c = read_members(entries, {"t": SPEC})
    assert (a.spec, b.spec, c.spec) == tuple(read_members([{"id": id, "spec": SPEC}])[0].spec for id in "abc")
    assert a.body is c.body
    assert a.body == b.body == SPEC


def test_a_template_has_a_pool() -> None:
    template = SPEC | {"placement": {"poolId": "gpu"}}
    assert [member.pool for member in read_members([{"id": "a", "use": "t"}, {"id": "b", "spec": SPEC}], {"t": template})] == [
        "gpu",
        "default",
    ]


def test_options_of_a_member() -> None:
    options = {"after": ["b"], "critical": False, "retries": 2, "onNodeLost": "retry", "backoff": {"maxMs": 5000}}
    a, b = read_members([{"id": "a", "spec": SPEC, **options}, {"id": "b", "spec": SPEC}])
    assert (a.after, a.critical, a.retries, a.on_node_lost, a.backoff) == (("b",), False, 2, "retry", Backoff(max_ms=5000))
    assert (b.after, b.critical, b.retries, b.on_node_lost, b.backoff) == ((), True, 0, "fail", Backoff())
    assert (a.most_attempts, b.most_attempts) == (13, 1)


@pytest.mark.parametrize("order", [1, -1])
def test_all_have_a_spec_or_none(order: int) -> None:
    entries = [{"id": "a", "spec": SPEC}, {"id": "b", "authorizedBy": "a"}][::order]
    assert refusal(*entries) == "member 'a' has a spec and member 'b' has none: give all members a spec, or none of them"


@pytest.mark.parametrize(
    ("entry", "pool"),
    [
        ({"spec": SPEC}, "default"),
        ({"spec": SPEC, "pool": None}, "default"),
        ({"spec": SPEC, "pool": "gpu"}, "gpu"),
        ({"spec": SPEC | {"placement": {"poolId": "gpu"}}}, "gpu"),
        ({"spec": SPEC | {"placement": {"queueName": "q"}}}, "default"),
        ({"spec": SPEC | {"placement": {"poolId": "gpu"}}, "pool": "gpu"}, "gpu"),
    ],
)
def test_pools(entry: dict[str, Any], pool: str) -> None:
    assert read_members([{"id": "a", **entry}])[0].pool == pool


@pytest.mark.parametrize(
    ("entry", "text"),
    [
        ({"id": "a b", "spec": SPEC}, "member 'a b' (members[1].id): the id of a member with a spec must match"),
        ({"spec": "x"}, "member 'a' (members[1].spec): spec must be an object, given the string \"x\""),
        ({"spec": SPEC | {"id": "x"}}, "member 'a' (members[1].spec.id): the id of the cell is made of"),
        ({"spec": SPEC | {"authority": []}}, "member 'a' (members[1].spec.authority): spec.authority must be an object, given a list"),
        ({"spec": SPEC | {"image": "x"}}, "member 'a' (members[1].spec.image): spec.image is not a known member"),
        ({"spec": SPEC | {"run": {"argv": []}}}, "member 'a' (members[1].spec.run.argv): spec.run.argv must be non-empty"),
        (
            {"spec": SPEC | {"authority": {"secretRefs": ["A", "/"]}}},
            "member 'a' (members[1].spec.authority.secretRefs[1]): authority.secretRefs[] must match",
        ),
        ({"spec": SPEC, "pool": 1}, "member 'a' (members[1].pool): pool must be a string, given the integer 1"),
        ({"spec": SPEC, "pool": "a.>"}, "member 'a' (members[1].pool): pool must match"),
        (
            {"spec": SPEC | {"placement": {"poolId": "gpu"}}, "pool": "cpu"},
            "member 'a' (members[1].pool): pool is 'cpu' and spec.placement.poolId is 'gpu': give one of them",
        ),
    ],
)
def test_a_fault_names_member_and_place(entry: dict[str, Any], text: str) -> None:
    assert refusal({"id": "lead", "spec": SPEC}, {"id": "a", "authorizedBy": "lead", **entry}).startswith(text)
