from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError
from cellos.eventlog.subject import MAX_SUBJECT_BYTES, read_subject_settings, resolve_subject, token

TEMPLATE, TENANT, LITERAL = "CELLOS_EVENTS_SUBJECT_TEMPLATE", "CELLOS_TENANT_ID", "CELL_OS_EVENTS_SUBJECT"


def subject(variables: dict[str, str], *, spec_id: str = "build", run_id: str = "run-1", tenant_id: str | None = None) -> str:
    return resolve_subject(read_subject_settings(variables), spec_id=spec_id, run_id=run_id, tenant_id=tenant_id)


def test_without_any_variable() -> None:
    assert subject({}) == "cellos.events.v1"
    assert subject({}, tenant_id="acme") == "cellos.events.v1"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("cellos.{tenantId}.{spec_id}.{run_id}", "cellos.acme.build.run-1"),
        ("{spec_id}.{spec_id}", "build.build"),
        ("fixed", "fixed"),
    ],
)
def test_a_template_is_filled(template: str, expected: str) -> None:
    assert subject({TEMPLATE: template}, tenant_id="acme") == expected


def test_a_template_wins_over_the_tenant_and_the_tenant_over_the_literal() -> None:
    variables = {TEMPLATE: "t.{run_id}", TENANT: "acme", LITERAL: "literal"}
    assert subject(variables) == "t.run-1"
    assert subject(variables | {TEMPLATE: "  "}) == "cellos.events.acme.build.run-1"
    assert subject(variables | {TEMPLATE: "", TENANT: " "}) == "literal"


def test_an_absent_tenant_has_a_word_in_each_place() -> None:
    assert subject({TEMPLATE: "x.{tenantId}"}) == "x._no_tenant_"
    assert subject({LITERAL: "x.{tenantId}"}) == "x.single"


def test_the_tenant_variable_is_trimmed() -> None:
    assert subject({TENANT: " acme "}) == "cellos.events.acme.build.run-1"


def test_the_literal_takes_the_tenant() -> None:
    assert subject({LITERAL: "x.{tenantId}"}, tenant_id="acme") == "x.acme"


@pytest.mark.parametrize("text", ["a.{tenant}", "a.{tenantid}.{run_id}", "a.{run_id", "a.run_id}", "a.{}", "a.{{run_id}}"])
def test_a_brace_that_belongs_to_no_placeholder_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read_subject_settings({TEMPLATE: text})
    assert str(caught.value).startswith(f'{TEMPLATE}: "{text}" has a brace')
    assert str(caught.value).endswith("; known here: {spec_id}, {run_id}, {tenantId}")


def test_the_literal_takes_nothing_but_the_tenant() -> None:
    with pytest.raises(ConfigError, match=r"CELL_OS_EVENTS_SUBJECT: .*; known here: \{tenantId\}$"):
        read_subject_settings({LITERAL: "x.{tenantId}.{run_id}"})


def test_a_value_that_looks_like_a_placeholder_is_none() -> None:
    assert subject({TEMPLATE: "{spec_id}.{run_id}"}, spec_id="{run_id}", run_id="{spec_id}") == "{run_id}.{spec_id}"


@pytest.mark.parametrize(
    ("value", "expected"),
    [("a.b", "a%2Eb"), ("*", "%2A"), (">", "%3E"), ("a b\n", "a%20b%0A"), ("100%", "100%25"), ("é", "é"), ("a\u2003b", "a%E2%80%83b")],
)
def test_what_nats_gives_a_meaning_is_encoded(value: str, expected: str) -> None:
    assert token(value) == expected
    assert subject({TEMPLATE: "x.{run_id}.y"}, run_id=value) == f"x.{expected}.y"
    assert subject({TENANT: "acme"}, run_id=value) == f"cellos.events.acme.build.{expected}"


@given(st.text(), st.text())
def test_a_value_is_one_token_and_no_two_values_are_the_same_one(first: str, second: str) -> None:
    assert re.fullmatch(r"[^.*>\s\x00-\x1f\x7f]+", token(first))
    assert (token(first) == token(second)) == (first == second)


@pytest.mark.parametrize("tenant", ["evil.tenant", "*", ">", "a b", "a\tb"])
def test_a_tenant_of_several_tokens_is_refused(tenant: str) -> None:
    with pytest.raises(ConfigError, match="CELLOS_TENANT_ID contains NATS-reserved char"):
        read_subject_settings({TENANT: tenant})


@pytest.mark.parametrize("text", ["a..b", ".a", "a.", "a.*", "a.>", "a b", "a\nPUB x", "x" * (MAX_SUBJECT_BYTES + 1)])
@pytest.mark.parametrize("variable", [TEMPLATE, LITERAL])
def test_a_subject_that_nothing_can_be_published_on_is_refused_with_its_variable(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        read_subject_settings({variable: text})
