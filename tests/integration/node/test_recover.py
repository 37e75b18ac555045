"""Spools of a former life, read and told to a real log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from cellos.core import events
from cellos.core.events import RunIdentity, parse_event, parse_signed
from cellos.core.evidence.sign import ED25519, Signer
from cellos.core.evidence.verify import verify
from cellos.core.formation.runs import Attempt, claimed, run_subject
from cellos.eventlog.spool import Spool, read_lines
from cellos.node.recover import Left, read_left, tell
from cellos.supervisor.compose import Host, make_emitter, new_chain, open_host
from cellos.supervisor.config import read_config


@pytest.fixture
def host(tmp_path: Path) -> Host:
    config = read_config({"CELLOS_STATE_DIR": str(tmp_path / "state"), "CELLOS_CELL_BACKEND": "stub"})
    return open_host(config, None, lambda text: None)


@pytest.fixture
def spool(host: Host, log: Any) -> Any:
    """Makes the spool of a run that was claimed, with so many events after the claim."""

    def make(more: int = 0, by: Host = host) -> tuple[Attempt, Path]:
        attempt = Attempt(log.new_id(), "m", 1)
        cell = f"{attempt.formation_id}.m"
        correlation = {"formationId": attempt.formation_id, "memberId": "m"}
        run = RunIdentity(cell_id=cell, spec_id=cell, run_id=log.new_id(), spec_hash="0" * 64, correlation=correlation)
        path = Path(host.state.spool, f"{run.run_id}.jsonl")
        file = Spool(str(path))
        emitter = make_emitter(by, new_chain(run), file, ())
        emitter.emit(claimed(run, attempt, node="n", life="l", pool="p"))
        for _ in range(more):
            emitter.emit(events.process_spawned(run, program="true", argc=1))
        file.close()
        return attempt, path

    return make


def only(host: Host) -> Left:
    [left] = read_left(host)
    return left


def told(log: Any, left: Left) -> str:
    return str(log.do(tell(left, log.log)))


def publish(log: Any, path: Path, attempt: Attempt, count: int) -> None:
    """The first events of a spool, as the former life did."""
    for line in list(read_lines(str(path)))[:count]:
        log.do(log.log.publish(run_subject(attempt), line, message_id=parse_event(line).id))


@pytest.mark.parametrize("known", [1, 2, 4])
def test_the_log_gets_what_it_lacks(host: Host, log: Any, spool: Any, known: int) -> None:
    attempt, path = spool(more=3)
    publish(log, path, attempt, known)
    assert told(log, only(host)) == "complete"
    destroyed = log.until_ended(attempt)
    assert (destroyed["reason"], destroyed["terminalState"], destroyed["chain"]["count"]) == ("node_restarted", "forced", 5)
    assert not path.exists()


def test_a_claim_that_the_log_never_took_is_forgotten(host: Host, log: Any, spool: Any) -> None:
    attempt, path = spool()
    assert told(log, only(host)) == "unclaimed"
    assert log.stored(attempt) == []
    assert not path.exists()


def test_an_attempt_that_somebody_else_has_is_put_aside(host: Host, log: Any, spool: Any) -> None:
    attempt, path = spool(more=1)
    publish(log, path, attempt, 1)
    closed = events.Event(id=log.new_id(), source="test", type=events.DESTROYED, data={})
    log.write(run_subject(attempt), closed)
    assert told(log, only(host)) == "refused"
    assert [found.name for found in path.parent.iterdir()] == [f"{path.name}.refused"]
    assert read_left(host) == []


def test_what_was_cut_off_in_the_middle_of_a_line_is_ended_after_the_last_whole_one(host: Host, spool: Any) -> None:
    _, path = spool(more=2)
    path.write_bytes(path.read_bytes()[:-10])
    left = only(host)
    assert [parse_event(line).type for line in left.lines][-1] == events.DESTROYED
    assert verify([line + b"\n" for line in left.lines]).verified
    assert read_left(host) == [left], "once is enough"


def test_it_is_signed_as_it_was_begun(host: Host, spool: Any) -> None:
    signer = Signer("k1", ED25519, bytes(32))
    _, path = spool(more=1)
    left = only(replace(host, signer=signer))
    assert [parse_signed(line)[1] for line in left.lines] == [None, None, None]
    path.unlink()

    _, path = spool(more=1, by=replace(host, signer=signer))
    before = path.read_bytes()
    assert read_left(host) == []
    assert path.read_bytes() == before, "left for a start with the key"
    assert all(parse_signed(line)[1] for line in only(replace(host, signer=signer)).lines)


def test_spools_that_are_none(host: Host) -> None:
    directory = Path(host.state.spool)
    (directory / "empty.jsonl").write_bytes(b"")
    (directory / "torn.jsonl").write_bytes(b'{"specversion"')
    (directory / "foreign.jsonl").write_bytes(b'{"specversion":"1.0","id":"a","source":"b","type":"c"}\n')
    (directory / "broken.jsonl").write_bytes(b"\xff\n")
    assert read_left(host) == []
    assert sorted(path.name for path in directory.iterdir()) == ["broken.jsonl.broken", "foreign.jsonl.broken"]
