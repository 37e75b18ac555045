from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.evidence.redact import DEFAULTS, OUR_WORDS, REDACTED, parse_fields, redact
from cellos.core.formation.runs import CANCELLED, LOST_REASONS
from cellos.errors import ConfigError

NAMES = st.sampled_from(["argv", "path", "reason", "Argv", "x"])
DATA = st.dictionaries(
    NAMES,
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=4),
        lambda inner: st.lists(inner) | st.dictionaries(NAMES, inner),
        max_leaves=12,
    ),
)


@pytest.mark.parametrize(
    ("setting", "fields"),
    [
        (None, set()),
        ("", set()),
        ("  ", set()),
        ("defaults", {"argv", "path", "reason"}),
        (" DeFaults ", {"argv", "path", "reason"}),
        ("defaults,x", {"argv", "path", "reason", "x"}),
        ("x, Defaults ,argv,", {"argv", "path", "reason", "x"}),
        (" argv , program,,argv", {"argv", "program"}),
        ("Argv", {"Argv"}),
    ],
)
def test_setting(setting: str | None, fields: set[str]) -> None:
    assert parse_fields(setting) == fields


def test_a_list_that_names_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="CELLOS_REDACT_EVENT_FIELDS: ',, ,' names no member; unset it"):
        parse_fields(" ,, , ")


@pytest.mark.parametrize("name", ["cellId", "specId", "runId", "specHash"])
def test_what_binds_an_event_to_its_run_is_kept(name: str) -> None:
    with pytest.raises(ConfigError, match=f"CELLOS_REDACT_EVENT_FIELDS: cannot redact {name}: ") as raised:
        parse_fields(f"argv,{name}")
    assert "leave it out" in str(raised.value)


def test_values_keep_their_shape() -> None:
    data = {"a": ["x", 1], "b": {"k": "v"}, "c": "text", "d": 5, "e": None, "f": True, "g": [], "h": ("x",)}
    assert redact(data, frozenset(data)) == {
        "a": [REDACTED],
        "b": {},
        "c": REDACTED,
        "d": REDACTED,
        "e": REDACTED,
        "f": REDACTED,
        "g": [REDACTED],
        "h": [REDACTED],
    }


def test_any_depth_and_only_exact_names() -> None:
    data = {"list": [{"path": "/x", "Path": "/y"}, [{"path": "/z"}]], "paths": "/w", "inner": {"path": {"path": "/v"}}}
    assert redact(data, DEFAULTS) == {
        "list": [{"path": REDACTED, "Path": "/y"}, [{"path": REDACTED}]],
        "paths": "/w",
        "inner": {"path": {}},
    }


@given(DATA, st.frozensets(NAMES))
def test_no_value_of_a_named_member_survives(data: dict[str, Any], fields: frozenset[str]) -> None:
    before = repr(data)
    after = redact(data, fields)
    assert repr(data) == before
    assert list(after) == list(data)
    assert redact(after, fields) == after
    for value in _values_of(after, fields):
        assert value in (REDACTED, [REDACTED], {})


@given(DATA)
def test_nothing_named_nothing_changed(data: dict[str, Any]) -> None:
    assert redact(data, frozenset()) == data
    assert redact(data, frozenset({"other"})) == data


def _values_of(value: object, fields: frozenset[str]) -> list[object]:
    if isinstance(value, dict):
        named = [each for name, each in value.items() if name in fields]
        return named + [found for name, each in value.items() if name not in fields for found in _values_of(each, fields)]
    return [found for each in value for found in _values_of(each, fields)] if isinstance(value, list) else []


def test_why_a_node_ended_a_run_is_not_redacted() -> None:
    assert {CANCELLED, *LOST_REASONS} == OUR_WORDS
    assert redact({"reason": "node_lost", "x": {"reason": "node_lost and more"}}, DEFAULTS) == {
        "reason": "node_lost",
        "x": {"reason": REDACTED},
    }
