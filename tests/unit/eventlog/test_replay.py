from __future__ import annotations

import json
import os
from collections import deque
from pathlib import Path
from typing import Any

import pytest

from cellos.core.events import Event, canonical_bytes
from cellos.errors import ConfigError, EventRefused, EventSinkError
from cellos.eventlog.dead_letters import DeadLetters
from cellos.eventlog.jetstream import PubAck
from cellos.eventlog.replay import Identity, Replayed, WaitingFile, consume, event_files, read_file, replay


def event(run_id: str | None, sequence: int | None, event_id: str | None = None, **data: Any) -> tuple[str, bytes]:
    """Id and bytes."""
    members: dict[str, Any] = {"specId": "build", **data}
    if run_id is not None:
        members["runId"] = run_id
    if sequence is not None:
        members["chain"] = {"seq": sequence, "prev": "00"}
    event_id = event_id or f"{run_id}-{sequence}"
    return event_id, canonical_bytes(Event(id=event_id, source="cellos-supervisor", type="t", data=members))


class FakeLog:
    """Acknowledges in the order that `pick` says, and refuses what it is told to."""

    def __init__(self, *, last_first: bool = False) -> None:
        self.stored: list[tuple[str, str, bytes]] = []
        self.answers: dict[str, EventSinkError] = {}
        self.break_at: str | None = None
        self.most = 0
        self._last_first = last_first
        self._flying: deque[tuple[int, tuple[str, str, bytes]]] = deque()
        self._count = 0

    def send(self, subject: str, payload: bytes, *, message_id: str) -> int:
        if message_id == self.break_at:
            raise EventSinkError("connection lost")
        if isinstance(self.answers.get(message_id), EventRefused):
            raise self.answers[message_id]
        self._count += 1
        self._flying.append((self._count, (message_id, subject, payload)))
        self.most = max(self.most, len(self._flying))
        return self._count

    def receive(self) -> tuple[int, PubAck | EventSinkError]:
        number, message = self._flying.pop() if self._last_first else self._flying.popleft()
        if message[0] in self.answers:
            return number, self.answers[message[0]]
        duplicate = message in self.stored
        if not duplicate:
            self.stored.append(message)
        return number, PubAck(stream="S", sequence=len(self.stored), duplicate=duplicate)

    @property
    def ids(self) -> list[str]:
        return [event_id for event_id, _, _ in self.stored]


def subject_of(run: Identity) -> str:
    return f"{run.tenant_id}.{run.spec_id}.{run.run_id}"


def spool(directory: Path, *events: tuple[str, bytes], name: str = "0123456789abcdef") -> str:
    path = directory / f"{name}.jsonl"
    path.write_bytes(b"".join(line + b"\n" for _, line in events))
    return str(path)


def read(*paths: str) -> list[WaitingFile]:
    return [file for path in paths if (file := read_file(path)) is not None]


def test_bytes_ids_and_order_are_kept_and_the_file_goes(tmp_path: Path) -> None:
    events = [event("r", number) for number in range(5)]
    [file] = read(spool(tmp_path, *events))
    log = FakeLog()
    done = replay([file], log, subject_of)
    assert log.stored == [(event_id, "None.build.r", line) for event_id, line in events]
    assert done.failure is None
    assert consume(file, done) is None
    assert os.listdir(tmp_path) == []


def test_each_run_is_in_its_order_whichever_files_hold_it_and_many_are_sent_at_once(tmp_path: Path) -> None:
    letters = DeadLetters(str(tmp_path))
    paths = [letters.store(*event("a", number), error="event sink: x") for number in (3, 0, 2)]
    paths.append(spool(tmp_path, event("b", 0), event("a", 1), event("b", 1)))
    log = FakeLog(last_first=True)
    files = read(*paths)
    done = replay(files, log, subject_of)
    assert [event_id for event_id in log.ids if event_id.startswith("a")] == ["a-0", "a-1", "a-2", "a-3"]
    assert [event_id for event_id in log.ids if event_id.startswith("b")] == ["b-0", "b-1"]
    assert log.most == 2
    assert [consume(file, done) for file in files] == [None] * 4
    assert os.listdir(tmp_path) == []


def test_a_dead_letter_gives_the_very_bytes_that_were_kept(tmp_path: Path) -> None:
    event_id, line = event("r", 0, text="é\u2028", number=1e-7)
    log = FakeLog()
    replay(read(DeadLetters(str(tmp_path)).store(event_id, line, "e")), log, subject_of)
    assert [payload for _, _, payload in log.stored] == [line]


def test_the_subject_is_of_the_run_though_not_every_event_names_its_parts(tmp_path: Path) -> None:
    measured = "m", canonical_bytes(Event(id="m", source="s", type="t", data={"runId": "r", "chain": {"seq": 1}}))
    path = spool(tmp_path, event("r", 0, correlation={"tenantId": "acme"}), measured)
    log = FakeLog()
    replay(read(path), log, subject_of)
    assert [subject for _, subject, _ in log.stored] == ["acme.build.r"] * 2


def test_events_of_no_run_are_sent_by_themselves(tmp_path: Path) -> None:
    path = spool(tmp_path, event(None, None, "x", tenantId="acme"), event(None, None, "y"))
    log = FakeLog()
    replay(read(path), log, subject_of)
    assert [(event_id, subject) for event_id, subject, _ in log.stored] == [("x", "acme.build.-"), ("y", "None.build.-")]


def test_a_failure_stops_everything_and_what_was_not_acknowledged_waits(tmp_path: Path) -> None:
    events = [event("r", number) for number in range(5)]
    [file] = read(spool(tmp_path, *events))
    log = FakeLog()
    log.answers["r-2"] = EventSinkError("stream S is full")
    done = replay([file], log, subject_of)
    assert log.ids == ["r-0", "r-1"]
    assert done.failure == "stream S is full"
    assert consume(file, done) == "stream S is full"
    assert Path(file.path).read_bytes() == b"".join(line + b"\n" for _, line in events[2:])


def test_a_replay_after_a_failed_one_sends_the_rest_only(tmp_path: Path) -> None:
    path = spool(tmp_path, *(event("r", number) for number in range(5)))
    log = FakeLog()
    log.break_at = "r-3"
    [file] = read(path)
    done = replay([file], log, subject_of)
    assert done.failure == "connection lost"
    assert consume(file, done) == "connection lost"
    log.break_at = None
    [file] = read(path)
    assert consume(file, replay([file], log, subject_of)) is None
    assert log.ids == [f"r-{number}" for number in range(5)]
    assert not os.path.exists(path)


def test_an_interrupted_replay_keeps_what_it_did(tmp_path: Path) -> None:
    [file] = read(spool(tmp_path, *(event("r", number) for number in range(5))))
    log = FakeLog()

    def interrupt(count: int) -> None:
        if count == 3:
            raise KeyboardInterrupt

    done = replay([file], log, subject_of, interrupt)
    assert (done.failure, done.interrupted) == ("interrupted", True)
    assert consume(file, done) == "interrupted"
    assert len(Path(file.path).read_bytes().splitlines()) == 2


def test_an_event_that_is_never_taken_stays_and_holds_up_nothing(tmp_path: Path) -> None:
    events = [event("r", number) for number in range(3)]
    [file] = read(spool(tmp_path, *events))
    log = FakeLog()
    log.answers["r-1"] = EventRefused("too large")
    done = replay([file], log, subject_of)
    assert log.ids == ["r-0", "r-2"]
    assert consume(file, done) == "too large"
    assert Path(file.path).read_bytes() == events[1][1] + b"\n"


def test_duplicates_count_as_acknowledged(tmp_path: Path) -> None:
    path = spool(tmp_path, event("r", 0), event("r", 1))
    log = FakeLog()
    files = read(path)
    assert replay(files, log, subject_of).duplicates == 0
    again = replay(files, log, subject_of)
    assert (len(again.acknowledged), again.duplicates) == (2, 2)


def test_a_file_that_is_no_spool_is_sent_and_kept(tmp_path: Path) -> None:
    path = spool(tmp_path, event("r", 0), name="audit")
    before = Path(path).read_bytes()
    [file] = read(path)
    done = replay([file], FakeLog(), subject_of)
    assert len(done.acknowledged) == 1
    assert consume(file, done) == "not a spool: kept as it is"
    assert Path(path).read_bytes() == before


def test_half_a_line_stays_with_its_file(tmp_path: Path) -> None:
    path = spool(tmp_path, event("r", 0))
    with open(path, "ab") as file:
        file.write(b'{"specversion"')
    [waiting] = read(path)
    log = FakeLog()
    done = replay([waiting], log, subject_of)
    assert log.ids == ["r-0"]
    assert consume(waiting, done) == "line 2 has no end"
    assert os.path.exists(path)


@pytest.mark.parametrize("line", [b"hello", b"{}", b'{"error":"x"}', b'{"error":"x","event":{}}', b'{"error":1,"event":{}}', b"\xff", b""])
def test_a_file_with_a_line_that_is_no_event_is_left_alone(tmp_path: Path, line: bytes) -> None:
    path = spool(tmp_path, event("r", 0), ("", line))
    before = Path(path).read_bytes()
    [file] = read(path)
    log = FakeLog()
    reason = consume(file, replay([file], log, subject_of))
    assert reason is not None
    assert reason.startswith("line 2: ")
    assert log.stored == []
    assert Path(path).read_bytes() == before


def test_a_file_that_grew_meanwhile_loses_nothing(tmp_path: Path) -> None:
    path = spool(tmp_path, event("r", 0))
    [file] = read(path)
    done = replay([file], FakeLog(), subject_of)
    with open(path, "ab") as opened:
        opened.write(event("r", 1)[1] + b"\n")
    assert consume(file, done) == "it has changed meanwhile; replay it again"
    assert len(Path(path).read_bytes().splitlines()) == 2


def test_a_file_that_somebody_else_removed_is_gone(tmp_path: Path) -> None:
    path = spool(tmp_path, event("r", 0))
    [file] = read(path)
    done = replay([file], FakeLog(), subject_of)
    os.unlink(path)
    assert consume(file, done) is None
    assert read_file(path) is None


def test_an_empty_file_stays(tmp_path: Path) -> None:
    [file] = read(spool(tmp_path))
    assert consume(file, Replayed(acknowledged=set(), refused={})) == "holds no event"
    assert os.path.exists(file.path)


def test_directories_stand_for_their_files(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "a.jsonl.new", "notes.txt"):
        (tmp_path / name).touch()
    assert event_files([str(tmp_path), str(tmp_path / "notes.txt"), str(tmp_path / "b.jsonl")]) == [
        str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "notes.txt")
    ]
    with pytest.raises(ConfigError, match=r"^cannot read .*: No such file"):
        event_files([str(tmp_path / "missing")])


def test_a_signed_event_is_ordered_and_named_by_what_it_holds(tmp_path: Path) -> None:
    wrapped = []
    for number in (1, 0):
        event_id, line = event("r", number)
        envelope = {"event": json.loads(line), "signerKid": "k", "algorithm": "ed25519", "signature": "x"}
        outer = Event(id=event_id, source="/cellos-supervisor/event-signing", type="dev.cellos.events.signed_envelope.v1", data=envelope)
        wrapped.append((event_id, canonical_bytes(outer)))
    log = FakeLog()
    replay(read(spool(tmp_path, *wrapped)), log, subject_of)
    assert log.ids == ["r-0", "r-1"]
    assert [subject for _, subject, _ in log.stored] == ["None.build.r"] * 2
    assert [payload for _, _, payload in log.stored] == [wrapped[1][1], wrapped[0][1]]
