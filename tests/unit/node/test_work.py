from __future__ import annotations

import json
from hashlib import sha256
from typing import Any

import pytest

from cellos.core.events import Event, canonical_bytes
from cellos.core.formation.runs import Attempt, dispatched, work_subject
from cellos.core.need import Need
from cellos.errors import EvidenceError
from cellos.node.work import Work, read_work

ATTEMPT = Attempt("0192", "build", 2)
SUBJECT = work_subject("p", "base", ATTEMPT)
SPEC: dict[str, Any] = {"lifetime": {"ttlSeconds": 60}, "authority": {}, "run": {"argv": ["true"], "limits": {"memoryMaxBytes": 4096}}}


def read(spec: dict[str, Any], **options: Any) -> Work:
    event = dispatched(ATTEMPT, name="f", pool="p", work="base", spec=spec, on_disconnect="finish", event_id="e", time="t")
    return read_work(SUBJECT, canonical_bytes(event), **options)


def test_the_document_is_the_spec_with_the_id_of_the_cell() -> None:
    work = read(SPEC)
    assert (work.attempt, work.pool, work.on_disconnect, work.fault) == (ATTEMPT, "p", "finish", None)
    assert work.document is not None
    assert work.document.spec.id == "0192.build"
    assert work.need == Need(memory_bytes=4096)
    document = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": "0192.build", **SPEC}}
    raw = json.dumps(document, sort_keys=True, separators=(",", ":")).encode()
    assert work.spec_hash == sha256(raw).hexdigest()


def test_the_correlation_says_whose_member_it_is() -> None:
    assert read(SPEC).identity("r").correlation == {"formationId": "0192", "memberId": "build"}
    run = read({**SPEC, "correlation": {"platform": "x", "tenantId": "acme"}}).identity("r")
    assert run.correlation is not None
    assert run.correlation.items() >= {"platform": "x", "formationId": "0192", "memberId": "build"}.items()
    assert (run.tenant_id, run.run_id, run.cell_id) == ("acme", "r", "0192.build")


def test_a_spec_cannot_choose_its_id() -> None:
    work = read({**SPEC, "id": "other"})
    assert work.document is not None
    assert work.document.spec.id == "0192.build"


def test_a_spec_that_cannot_be_run_is_an_attempt_with_a_fault() -> None:
    work = read({**SPEC, "nonsense": 1})
    assert work.document is None
    assert "nonsense" in str(work.fault)
    assert (work.identity("r").cell_id, work.need) == ("0192.build", Need())
    assert read({**SPEC, "nonsense": 1}, allow_unknown_fields=True).fault is None


@pytest.mark.parametrize(
    ("subject", "line"),
    [
        ("cellos.events.other", b'{"specversion":"1.0","id":"a","source":"s","type":"dev.cellos.events.cell.run.v1.dispatched","data":{}}'),
        (SUBJECT, canonical_bytes(Event(id="a", source="s", type="other", data={}))),
        (SUBJECT, canonical_bytes(Event(id="a", source="s", type="dev.cellos.events.cell.run.v1.dispatched", data={"pool": 1}))),
        (SUBJECT, b"not json"),
    ],
)
def test_what_is_no_work_is_refused(subject: str, line: bytes) -> None:
    with pytest.raises(EvidenceError):
        read_work(subject, line)
