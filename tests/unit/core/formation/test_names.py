import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.documents.identifiers import is_portable
from cellos.core.formation.members import cell_id
from cellos.core.formation.names import NAME_PATTERN, is_member_id, refuse_name, shown
from cellos.errors import FormationRejected

UUID = "018f6f0e-0000-7000-8000-000000000001"


def fault(name: str) -> str:
    with pytest.raises(FormationRejected) as caught:
        refuse_name(name)
    assert (caught.value.problem.type, caught.value.problem.status) == ("/problems/bad-request", 400)
    return caught.value.text


@pytest.mark.parametrize("name", ["demo", "my-formation-v2", "team.alpha_one", "a", "_", "9", "a..b", "_-_", "a" * 253, UUID])
def test_names_that_are_taken(name: str) -> None:
    refuse_name(name)
    assert re.fullmatch(NAME_PATTERN, name)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("", "formation name must not be empty"),
        ("a" * 254, "formation name length 254 exceeds maximum of 253 bytes"),
        ("ü" * 127, "formation name length 254 exceeds maximum of 253 bytes"),
        ("/" * 254, "formation name length 254 exceeds maximum of 253 bytes"),
        (".", "formation name '.' is reserved"),
        ("..", "formation name '..' is reserved"),
        ("a b", r"formation name contains disallowed character \x20 at byte offset 1 (allowed: A-Z a-z 0-9 . - _)"),
        ("a!b", "formation name contains disallowed character '!' at byte offset 1 (allowed: A-Z a-z 0-9 . - _)"),
        ("~", "formation name contains disallowed character '~' at byte offset 0 (allowed: A-Z a-z 0-9 . - _)"),
        ("a\x7f", r"formation name contains disallowed character \x7f at byte offset 1 (allowed: A-Z a-z 0-9 . - _)"),
        ("-ü", r"formation name contains disallowed character \xc3 at byte offset 1 (allowed: A-Z a-z 0-9 . - _)"),
        ("-a.", "formation name '-a.' must not start with '-' or '.'"),
        ("...", "formation name '...' must not start with '-' or '.'"),
        ("a-", "formation name 'a-' must not end with '-' or '.'"),
        ("a.", "formation name 'a.' must not end with '-' or '.'"),
    ],
)
def test_the_first_broken_rule_is_told(name: str, text: str) -> None:
    assert fault(name) == text
    assert not re.fullmatch(NAME_PATTERN, name)


@given(st.text(alphabet="aZ9._- /ü\n", max_size=6))
def test_the_pattern_says_the_same(name: str) -> None:
    try:
        refuse_name(name)
    except FormationRejected:
        assert not re.fullmatch(NAME_PATTERN, name)
    else:
        assert re.fullmatch(NAME_PATTERN, name)


@pytest.mark.parametrize(
    ("member_id", "taken"),
    [
        ("a", True),
        ("A.b_c-9", True),
        ("a" * 64, True),
        ("a" * 65, False),
        ("", False),
        ("a..b", False),
        (".a", False),
        ("a b", False),
        ("ü", False),
        ("a\n", False),
    ],
)
def test_ids_of_members_with_specs(member_id: str, taken: bool) -> None:
    assert is_member_id(member_id) is taken


@given(st.from_regex(r"[A-Za-z0-9._-]{1,66}", fullmatch=True))
def test_a_cell_id_is_an_identifier(member_id: str) -> None:
    if is_member_id(member_id):
        assert is_portable(member_id)
        assert is_portable(cell_id(UUID, member_id))
        assert len(cell_id(UUID, member_id)) <= 101


@given(st.text(max_size=400))
def test_what_is_shown_is_one_line_of_bounded_length(value: str) -> None:
    text = shown(value)
    assert text.isprintable()
    assert len(text) <= 300 * len("\\u{10ffff}") + 3
    assert value not in ("", "a") or text == f"'{value}'"
