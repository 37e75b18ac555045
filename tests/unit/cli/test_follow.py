from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.cli.follow import json_line, text_line
from cellos.client.answers import Entry
from cellos.core.events import PREFIX

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=5), inner),
)


def entry(event: object, seq: int = 7) -> Entry:
    raw = event if isinstance(event, bytes) else json.dumps(event).encode()
    return Entry(seq=seq, event=msgspec.Raw(raw))


def event(kind: str, **data: Any) -> dict[str, Any]:
    return {
        "specversion": "1.0",
        "id": "e",
        "source": "s",
        "type": PREFIX + kind,
        "time": "2026-11-21T14:03:12.120999999+00:00",
        "data": data,
    }


class TestText:
    @pytest.mark.parametrize(
        ("kind", "data", "line"),
        [
            ("lifecycle.v1.started", {"cellId": "c", "specId": "s", "backend": "stub", "ttlSeconds": 9, "enforced": []},
             "c                         started        backend stub, ttl 9 s, NOTHING IS ENFORCED"),
            ("formation.v1.created", {"formationId": "f", "formationName": "demo", "cellCount": 1, "failedCellIds": []},
             "demo                      CREATED        1 member"),
            ("formation.v1.failed", {"formationName": "demo", "cellCount": 3, "failedCellIds": ["a", "b"], "reason": "r"},
             "demo                      FAILED         failed: a, b; r"),
            ("formation.v1.running", {"formationId": "f", "formationName": ""}, "f                         RUNNING"),
            ("other.v1.news", {"x": 1}, "-                         news           x 1"),
        ],
    )  # fmt: skip
    def test_one_line_each(self, kind: str, data: dict[str, Any], line: str) -> None:
        assert text_line(entry(event(kind, **data))) == f"2026-11-21 14:03:12.120  {line}"

    def test_a_signed_event_is_shown_as_what_it_is(self) -> None:
        inner = event("formation.v1.running", formationId="f", formationName="demo") | {"datacontenttype": None, "traceparent": None}
        envelope = {"event": inner, "signerKid": "k", "algorithm": "ed25519", "signature": "AA"}
        wrapped = {"specversion": "1.0", "id": "e", "source": "s", "type": "dev.cellos.events.signed_envelope.v1", "data": envelope}
        assert text_line(entry(wrapped)).split() == ["2026-11-21", "14:03:12.120", "demo", "RUNNING"]

    def test_what_is_no_event_is_said(self) -> None:
        assert " ".join(text_line(entry(b'{"x":1}', seq=9)).split()).startswith("? event 9 cannot be read: not an event")

    def test_without_a_time(self) -> None:
        assert text_line(entry(event("formation.v1.running", formationName="demo") | {"time": "x"})).split() == ["?", "demo", "RUNNING"]

    @given(
        st.dictionaries(st.sampled_from(["cellId", "formationName", "formationId", "cellCount", "failedCellIds", "reason"]), JSON),
        st.sampled_from(["created", "failed"]),
    )
    def test_hostile_data_makes_one_printable_line(self, data: dict[str, Any], phase: str) -> None:
        line = text_line(entry(event(f"formation.v1.{phase}", **data)))
        assert line.isprintable()


class TestJson:
    def test_the_bytes_of_the_event_stay(self) -> None:
        raw = '{"b": 1.0,  "a":"\\u00e9é"}'
        assert json_line(entry(raw.encode())) == '{"seq":7,"event":' + raw + "}"

    @given(JSON, st.sampled_from([None, 0, 1, "\r\n"]))
    def test_one_line_with_the_same_value(self, value: Any, indent: Any) -> None:
        line = json_line(entry(json.dumps(value, indent=indent).encode()))
        assert "\n" not in line
        assert "\r" not in line
        assert json.loads(line) == {"seq": 7, "event": value}
