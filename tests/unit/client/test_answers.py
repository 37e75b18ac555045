from __future__ import annotations

import json
from typing import Any
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.client.answers import Entry, Expired, after_close, formation_path, is_id, problem_of, quoted, read_frame, records, status_of
from cellos.core.problem import RETENTION_EXHAUSTED, problem, retention_exhausted
from cellos.errors import CursorExpired, ServerError, ServerUnreachable

ID = "0198f0c4-7d5e-4a31-9c55-8a5d1f0e2b11"


def expired(oldest: int | None) -> Expired:
    return Expired(type=RETENTION_EXHAUSTED, oldest_seq=oldest)


class TestPaths:
    @pytest.mark.parametrize("ident", [ID, ID.upper(), ID.replace("-", ""), f"{{{ID}}}", f"urn:uuid:{ID}"])
    def test_an_id_goes_by_id(self, ident: str) -> None:
        assert formation_path(ident) == f"/v1/formations/{ident}"

    @pytest.mark.parametrize("ident", ["demo", "a.b", ID[:-1] + "g", ID[:-1], ID.replace("-", "", 1), f"{ID}\n", f"x{ID.replace('-', '')}"])
    def test_all_else_goes_by_name(self, ident: str) -> None:
        assert not is_id(ident)
        assert formation_path(ident) == f"/v1/formations/by-name/{quoted(ident)}"

    def test_no_name_is_a_path_too(self) -> None:
        assert formation_path("") == "/v1/formations/by-name/"

    def test_whatever_means_something_in_a_url_is_escaped(self) -> None:
        assert quoted("a-b.c_d/ %?#é") == "a%2Db%2Ec%5Fd%2F%20%25%3F%23%C3%A9"

    @given(st.text(st.characters(codec="utf-8")))
    def test_escaping_is_undone_by_every_server(self, text: str) -> None:
        assert unquote(quoted(text)) == text
        assert not quoted(text) or quoted(text).replace("%", "").isalnum()


class TestRecords:
    @pytest.mark.parametrize(
        "answer",
        [[{"id": "a"}], {"cells": [{"id": "a"}]}, {"cells": [{"id": "a"}], "cursor": 2**64 - 1}, {"items": [{"id": "a"}], "cursor": 1}],
    )
    def test_every_envelope(self, answer: Any) -> None:
        assert records(json.dumps(answer).encode(), "cells") == [{"id": "a"}]

    def test_an_empty_object_is_an_empty_list(self) -> None:
        assert records(b"{}", "formations") == []

    @pytest.mark.parametrize("pair", [("formations", "cells"), ("formations", "items"), ("cells", "items")])
    def test_two_lists_are_one_too_many(self, pair: tuple[str, str]) -> None:
        with pytest.raises(ServerError, match=f"{pair[0]} and {pair[1]}"):
            records(json.dumps({name: [] for name in pair}).encode(), "cells")

    @pytest.mark.parametrize("answer", [b"", b"nonsense", b"[1]", b'{"cells": 1}', b'"text"', b"\xff"])
    def test_no_list(self, answer: bytes) -> None:
        with pytest.raises(ServerError, match="cannot read the list of cells"):
            records(answer, "cells")

    @pytest.mark.parametrize(
        ("record", "word"), [({"status": "A", "state": "B"}, "A"), ({"state": "B"}, "B"), ({}, ""), ({"status": 1}, "")]
    )
    def test_status_under_both_names(self, record: dict[str, Any], word: str) -> None:
        assert status_of(record) == word


class TestProblems:
    def test_the_servers_own(self) -> None:
        sent = problem("conflict", "formation name 'x' already in use by y")
        assert problem_of(409, "application/problem+json; charset=utf-8", sent.body()) == sent

    @pytest.mark.parametrize(
        ("media_type", "body", "detail"),
        [
            ("text/plain; charset=utf-8", b" gone \n", "gone"),
            ("text/html", b"<h1>", ""),
            ("application/problem+json", b"{", ""),
            ("", b"", ""),
        ],
    )
    def test_one_of_somebody_between(self, media_type: str, body: bytes, detail: str) -> None:
        found = problem_of(502, media_type, body)
        assert (found.type, found.title, found.status, found.detail) == ("about:blank", "HTTP 502 Bad Gateway", 502, detail)

    def test_a_status_without_a_name(self) -> None:
        assert problem_of(599, "", b"").title == "HTTP 599"


class TestFrames:
    def test_the_bytes_of_the_event_stay(self) -> None:
        event = b'{"b": 1.0,  "a":"\\u00e9", "b":2}'
        entry = read_frame(b'{"seq":7,"event":' + event + b"}")
        assert isinstance(entry, Entry)
        assert (entry.seq, bytes(entry.event)) == (7, event)

    @pytest.mark.parametrize("oldest", [7, None])
    def test_the_cursor_is_too_old(self, oldest: int | None) -> None:
        assert read_frame(retention_exhausted(oldest)) == expired(oldest)

    @pytest.mark.parametrize("frame", [b"", b"{}", b'{"seq":1}', b'{"seq":"1","event":{}}', b'{"type":"other"}'])
    def test_anything_else_is_an_error(self, frame: bytes) -> None:
        with pytest.raises(ServerError, match="cannot read a frame"):
            read_frame(frame)


class TestClose:
    def test_the_cursor_is_below_the_floor(self) -> None:
        error = after_close(4410, "retention-exhausted", cursor=3, expired=expired(9), subject_is_right=False)
        assert isinstance(error, CursorExpired)
        assert (error.oldest, error.text) == (9, "no events follow 3: the oldest that is left is 9")

    @pytest.mark.parametrize("last", [None, expired(None), expired(1)])
    def test_the_stream_is_another(self, last: Expired | None) -> None:
        error = after_close(4410, "retention-exhausted", cursor=3, expired=last, subject_is_right=False)
        assert isinstance(error, CursorExpired)
        assert error.text == "no events follow 3: the log was made anew"

    def test_a_refusal(self) -> None:
        error = after_close(1008, "subscribe failed", cursor=0, expired=None, subject_is_right=False)
        assert type(error) is ServerError
        assert error.text == "/ws/events was closed: subscribe failed"

    def test_another_refusal(self) -> None:
        assert type(after_close(1008, "enough", cursor=0, expired=None, subject_is_right=True)) is ServerError

    @pytest.mark.parametrize(
        ("code", "reason", "text"),
        [
            (1008, "no upstream broker configured", "closed with 1008 (no upstream broker configured)"),
            (1008, "subscribe failed", "closed with 1008 (subscribe failed)"),
            (1001, "", "closed with 1001"),
            (4408, "too slow", "closed with 4408 (too slow)"),
            (None, "", "lost"),
        ],
    )
    def test_what_another_connection_mends(self, code: int | None, reason: str, text: str) -> None:
        error = after_close(code, reason, cursor=0, expired=None, subject_is_right=True)
        assert isinstance(error, ServerUnreachable)
        assert error.text == f"the stream of events was {text}"
