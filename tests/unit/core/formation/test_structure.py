import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.formation.structure import Link, refuse_order, refuse_structure
from cellos.errors import FormationRejected


def problem(coordinator: str, *links: tuple[str, str | None]) -> tuple[str, str] | None:
    """Type, without its beginning, and detail."""
    try:
        refuse_structure(coordinator, [Link(*link) for link in links])
    except FormationRejected as error:
        return error.problem.type.removeprefix("/problems/formation/"), error.text
    return None


@pytest.mark.parametrize(
    "links",
    [
        [("c", None)],
        [("c", None), ("a", "c")],
        [("b", "a"), ("a", "c"), ("c", None)],
        [("a", "c"), ("b", "c"), ("c", None), ("d", "a")],
        [("c", None), ("", "c"), ("\n", "")],
    ],
)
def test_trees_are_taken(links: list[tuple[str, str | None]]) -> None:
    assert problem("c", *links) is None


@pytest.mark.parametrize(
    ("links", "expected"),
    [
        ([], ("no-coordinator", "coordinator 'c' must appear in members list")),
        ([("a", None)], ("no-coordinator", "coordinator 'c' must appear in members list")),
        ([("c", None), ("a", "c"), ("a", "c")], ("duplicate-member-id", "duplicate member id 'a'")),
        ([("c", None), ("c", None)], ("duplicate-member-id", "duplicate member id 'c'")),
        ([("c", "a"), ("a", "c")], ("authority-not-narrowing", "coordinator 'c' must not declare authorizedBy")),
        ([("c", "c")], ("authority-not-narrowing", "coordinator 'c' must not declare authorizedBy")),
        ([("c", None), ("a", None)], ("authority-not-narrowing", "non-coordinator member 'a' missing authorizedBy")),
        ([("c", None), ("a", "x")], ("authority-not-narrowing", "member 'a' references unknown parent 'x'")),
        ([("c", None), ("a", "a")], ("cycle", "authorizedBy cycle detected involving member 'a'")),
        ([("c", None), ("a", "b"), ("b", "a")], ("cycle", "authorizedBy cycle detected involving member 'a'")),
        ([("c", None), ("d", "a"), ("a", "b"), ("b", "a")], ("cycle", "authorizedBy cycle detected on chain starting at 'd'")),
        ([("c", None), ("ok", "c"), ("b", "a"), ("a", "b")], ("cycle", "authorizedBy cycle detected involving member 'b'")),
    ],
)
def test_each_rejection(links: list[tuple[str, str | None]], expected: tuple[str, str]) -> None:
    assert problem("c", *links) == expected


@pytest.mark.parametrize(
    ("links", "kind"),
    [
        # Everything is wrong here; then, one by one, what comes first is right.
        ([("a", "a"), ("a", "a"), ("b", None)], "no-coordinator"),
        ([("a", "a"), ("a", "a"), ("b", None), ("c", "a")], "duplicate-member-id"),
        ([("a", "a"), ("b", None), ("c", "a")], "authority-not-narrowing"),
        ([("a", "a"), ("b", "c"), ("c", None)], "cycle"),
    ],
)
def test_the_order(links: list[tuple[str, str | None]], kind: str) -> None:
    found = problem("c", *links)
    assert found is not None
    assert found[0] == kind


def test_parents_are_checked_in_the_order_of_the_document() -> None:
    assert problem("c", ("x", None), ("c", "x")) == ("authority-not-narrowing", "non-coordinator member 'x' missing authorizedBy")
    assert problem("c", ("c", "x"), ("x", None)) == ("authority-not-narrowing", "coordinator 'c' must not declare authorizedBy")


def test_a_long_chain_costs_each_member_once() -> None:
    # Walked anew from each member, this would take hundreds of millions of steps.
    links = [(str(number), str(number - 1)) for number in range(1, 30_000)]
    assert problem("0", ("0", None), *links) is None
    assert problem("0", ("0", None), *links[1:], ("1", "29999")) == ("cycle", "authorizedBy cycle detected involving member '2'")


@given(st.data(), st.integers(2, 7))
def test_cycles_are_always_found(data: st.DataObject, count: int) -> None:
    """Any assignment of parents: taken exactly where every walk upwards, in as many steps as there are members, ends at the coordinator."""
    ids = [str(number) for number in range(count)]
    links: list[tuple[str, str | None]] = [("0", None), *((each, data.draw(st.sampled_from(ids))) for each in ids[1:])]
    links = data.draw(st.permutations(links))
    parents = dict(links)

    def walk(start: str) -> list[str]:
        steps = [start]
        while len(steps) <= count and (parent := parents[steps[-1]]) is not None:
            steps.append(parent)
        return steps

    lost = [start for start, _ in links if walk(start)[-1] != "0"]
    if not lost:
        assert problem("0", *links) is None
        return
    how = "involving member" if lost[0] in walk(lost[0])[1:] else "on chain starting at"
    assert problem("0", *links) == ("cycle", f"authorizedBy cycle detected {how} '{lost[0]}'")


# --- after ------------------------------------------------------------------------------------------------------------------------------


def order_problem(after: dict[str, list[str]]) -> tuple[str, str] | None:
    try:
        refuse_order(after)
    except FormationRejected as error:
        return error.problem.type.removeprefix("/problems/"), error.text
    return None


@pytest.mark.parametrize("after", [{}, {"a": []}, {"a": ["b"], "b": []}, {"a": ["b", "c"], "b": ["c"], "c": []}])
def test_orders_are_taken(after: dict[str, list[str]]) -> None:
    assert order_problem(after) is None


@pytest.mark.parametrize(
    ("after", "expected"),
    [
        ({"a": [], "b": ["a", "x"]}, ("bad-request", "member 'b' (members[1].after[1]): after names 'x', which is no member")),
        (
            {"fetch": ["fetsh"]},
            ("bad-request", "member 'fetch' (members[0].after[0]): after names 'fetsh', which is no member; did you mean 'fetch'?"),
        ),
        ({"a": ["a"]}, ("formation/cycle", "after makes a circle: 'a' waits for 'a'")),
        ({"z": ["a"], "a": ["b"], "b": ["a"]}, ("formation/cycle", "after makes a circle: 'a' waits for 'b', 'b' waits for 'a'")),
        (
            {"a": ["b"], "b": ["c"], "c": [], "d": ["e", "c"], "e": ["c", "d"]},
            ("formation/cycle", "after makes a circle: 'd' waits for 'e', 'e' waits for 'd'"),
        ),
        ({"a": ["a"], "b": ["x"]}, ("bad-request", "member 'b' (members[1].after[0]): after names 'x', which is no member")),
    ],
)
def test_no_order(after: dict[str, list[str]], expected: tuple[str, str]) -> None:
    assert order_problem(after) == expected


def test_a_long_circle_is_told_in_part() -> None:
    found = order_problem({str(at): [str((at + 1) % 1000)] for at in range(1000)})
    assert found is not None
    assert found[1].startswith("after makes a circle: '0' waits for '1', '1' waits for '2', ")
    assert found[1].endswith(", '5' waits for '6', and 994 more")


@given(st.data(), st.integers(1, 6))
def test_circles_are_always_found(data: st.DataObject, count: int) -> None:
    ids = [str(number) for number in range(count)]
    after = {id: data.draw(st.lists(st.sampled_from(ids), unique=True, max_size=2)) for id in ids}
    done: set[str] = set()
    while ready := {id for id in ids if id not in done and set(after[id]) <= done}:
        done |= ready
    found = order_problem(after)
    assert (found is None) == (len(done) == count)
    assert found is None or found[0] == "formation/cycle"
