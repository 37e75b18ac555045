from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest

from cellos.core.events import RunIdentity
from cellos.errors import ConfigError, EventSinkError
from cellos.eventlog import default_server, forward
from cellos.eventlog.forward import Undelivered
from cellos.supervisor.config import Config, Fallback, refuse_fallbacks
from cellos.supervisor.sinks import Sinks, Unacknowledged, open_sinks

RUN = RunIdentity(cell_id="cell-1", spec_id="cell-1", run_id="run-1", spec_hash="0" * 64, tenant_id="acme")
LINE = b'{"id":"id-1"}'


class FakeForwarder:
    """A connection to NATS that acknowledges nothing."""

    made: list[FakeForwarder]
    failure: str | None = None
    """Why the first attempt to connect failed."""

    def __init__(self, url: str, subject: str, *, ca_file: str | None = None) -> None:
        self.url, self.subject, self.ca_file = url, subject, ca_file
        self.events: list[tuple[str, bytes]] = []
        self.waited: list[float] = []
        self.finished = 0
        self.closed = 0
        self.made.append(self)

    def emit(self, event_id: str, line: bytes) -> None:
        self.events.append((event_id, line))

    def connected(self, timeout: float) -> str | None:
        self.waited.append(timeout)
        return self.failure

    def finish(self, seconds: float) -> tuple[Undelivered, ...]:
        self.finished += 1
        return tuple(Undelivered(event_id=event_id, line=line, error="event sink: no ack") for event_id, line in self.events)

    def close(self) -> None:
        self.closed += 1


class Scene:
    def __init__(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.path = path
        self.jsonl = path / "events.jsonl"
        self.letters = path / "letters"
        self.letters.mkdir()
        self.listens = False
        self.asked = 0
        self.fallbacks: list[Fallback] = []
        self.fake = type("Fake", (FakeForwarder,), {"made": []})
        monkeypatch.setattr(forward, "Forwarder", self.fake)
        monkeypatch.setattr(default_server, "default_server_listens", self._listens)

    def _listens(self) -> bool:
        self.asked += 1
        return self.listens

    def open(self, environment: dict[str, str] | None = None, *, record_stays: bool = False, **config: Any) -> Sinks:
        made = Config(environment=environment or {}, **config)
        return open_sinks(made, RUN, self.fallbacks, record_stays=record_stays)

    @property
    def forwarder(self) -> FakeForwarder:
        [made] = self.fake.made
        return made

    @property
    def dead(self) -> list[dict[str, Any]]:
        return [json.loads(path.read_text()) for path in sorted(self.letters.iterdir())]


@pytest.fixture
def scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scene:
    return Scene(tmp_path, monkeypatch)


def emit(sinks: Sinks, *lines: bytes) -> None:
    for number, line in enumerate(lines or (LINE,), start=1):
        for outlet in sinks.outlets:
            outlet.emit(f"id-{number}", line)


class TestNowhere:
    def test_nobody_said_anything(self, scene: Scene) -> None:
        with scene.open() as sinks:
            assert sinks.outlets == ()
            assert sinks.none_at_all, "the run's own file is all that there is"
            assert (sinks.forwards, sinks.mirror_size) == (False, 0)
            assert sinks.finish() == Unacknowledged()
        assert scene.asked == 1, "whether a server listens where it is by default"

    def test_the_noop_sink_is_an_answer(self, scene: Scene) -> None:
        scene.listens = True
        with scene.open(noop_sink=True, nats_url="nats://h") as sinks:
            assert sinks.outlets == ()
            assert not sinks.none_at_all
        assert scene.fake.made == [], "NATS is never tried"
        assert scene.asked == 0

    def test_it_contradicts_what_the_hardened_profile_requires(self, scene: Scene) -> None:
        with pytest.raises(ConfigError) as caught:
            scene.open(noop_sink=True, profile="hardened", require_jetstream=True)
        assert str(caught.value) == (
            "CELL_OS_USE_NOOP_SINK contradicts CELLOS_DEPLOYMENT_PROFILE=hardened, which requires JetStream; unset it, "
            "or set CELL_OS_REQUIRE_JETSTREAM=0"
        )

    @pytest.mark.parametrize("config", [{"profile": "hardened"}, {"require_jetstream": True}])
    def test_but_not_one_of_them_alone(self, scene: Scene, config: dict[str, Any]) -> None:
        with scene.open(noop_sink=True, **config) as sinks:
            assert not sinks.forwards


class TestJsonl:
    def test_lines_are_appended(self, scene: Scene) -> None:
        scene.jsonl.write_text("before\n")
        with scene.open(jsonl=str(scene.jsonl)) as sinks:
            assert sinks.mirror_size == 7
            assert not sinks.none_at_all
            emit(sinks)
        assert scene.jsonl.read_bytes() == b"before\n" + LINE + b"\n"

    def test_one_that_cannot_be_opened_leaves_no_connection_behind(self, scene: Scene) -> None:
        with pytest.raises(EventSinkError, match=r"jsonl open /nowhere/x: No such file or directory \(os error 2\)"):
            scene.open(jsonl="/nowhere/x", nats_url="nats://h")
        assert scene.forwarder.closed == 1

    def test_beside_the_noop_sink_it_still_gets_everything(self, scene: Scene) -> None:
        with scene.open(jsonl=str(scene.jsonl), noop_sink=True) as sinks:
            emit(sinks)
        assert scene.jsonl.read_bytes() == LINE + b"\n"


class TestNats:
    def test_the_same_bytes_go_to_both(self, scene: Scene) -> None:
        with scene.open({"NATS_CA_FILE": " /ca.pem "}, nats_url="nats://h:1", jsonl=str(scene.jsonl)) as sinks:
            emit(sinks)
            assert sinks.forwards
        assert scene.forwarder.events == [("id-1", LINE)]
        assert scene.jsonl.read_bytes() == LINE + b"\n"
        assert (scene.forwarder.url, scene.forwarder.ca_file, scene.forwarder.subject) == ("nats://h:1", "/ca.pem", "cellos.events.v1")
        assert scene.forwarder.waited == [], "nobody waits for the connection"
        assert scene.forwarder.closed == 1

    @pytest.mark.parametrize(
        ("environment", "subject"),
        [
            ({"CELL_OS_EVENTS_SUBJECT": "mine"}, "mine"),
            ({"CELLOS_TENANT_ID": "t", "CELL_OS_EVENTS_SUBJECT": "mine"}, "cellos.events.t.cell-1.run-1"),
            ({"CELLOS_EVENTS_SUBJECT_TEMPLATE": "e.{tenantId}.{run_id}", "CELLOS_TENANT_ID": "t"}, "e.acme.run-1"),
        ],
    )
    def test_the_subject(self, scene: Scene, environment: dict[str, str], subject: str) -> None:
        with scene.open(environment, nats_url="nats://h"):
            assert scene.forwarder.subject == subject

    def test_one_that_cannot_be_used_is_refused_also_where_nothing_is_published(self, scene: Scene) -> None:
        with pytest.raises(ConfigError, match="CELL_OS_EVENTS_SUBJECT"):
            scene.open({"CELL_OS_EVENTS_SUBJECT": "a..b"}, noop_sink=True)

    def test_where_it_is_by_default(self, scene: Scene) -> None:
        scene.listens = True
        with scene.open() as sinks:
            assert sinks.forwards
        assert scene.forwarder.url == "nats://127.0.0.1:4222"

    def test_it_is_not_looked_for_where_the_record_is_kept_anyway(self, scene: Scene) -> None:
        scene.listens = True
        with scene.open(record_stays=True) as sinks:
            assert not sinks.forwards
        assert scene.asked == 0

    def test_but_used_where_it_was_named(self, scene: Scene) -> None:
        with scene.open(record_stays=True, nats_url="nats://h") as sinks:
            assert sinks.forwards

    def test_required_and_there(self, scene: Scene) -> None:
        with scene.open(require_jetstream=True) as sinks:
            assert sinks.forwards
        assert scene.forwarder.url == "nats://127.0.0.1:4222"
        assert scene.forwarder.waited == [5.0]

    def test_required_and_not_there(self, scene: Scene) -> None:
        scene.fake.failure = "nats connect: nats://h:4222: Connection refused (os error 111)"
        with pytest.raises(ConfigError) as caught:
            scene.open(require_jetstream=True, nats_url="nats://user:s3cret@h:4222")
        assert str(caught.value) == (
            "CELL_OS_REQUIRE_JETSTREAM is set but JetStream connect failed (broker nats://h:4222): "
            "nats connect: nats://h:4222: Connection refused (os error 111)"
        )
        assert scene.forwarder.closed == 1

    def test_not_required_and_not_there(self, scene: Scene) -> None:
        """The events wait in the spool."""
        scene.fake.failure = "refused"
        with scene.open(nats_url="nats://h") as sinks:
            assert sinks.forwards
        assert scene.fallbacks == []


class TestStrict:
    """What could not be followed is listed: with strict configuration nothing runs."""

    def test_a_server_that_is_not_there(self, scene: Scene) -> None:
        scene.fake.failure = "nats connect: refused"
        with scene.open(strict=True, nats_url="nats://user:s3cret@h:4222") as sinks:
            assert not sinks.forwards
        assert scene.forwarder.closed == 1
        with pytest.raises(ConfigError) as caught:
            refuse_fallbacks(scene.fallbacks)
        assert str(caught.value) == (
            "CELLOS_STRICT_CONFIG is set: refusing to start with 1 ignored/misconfigured env var(s): "
            '[NATS_URL="nats://h:4222" (nats connect: refused)]'
        )

    def test_none_where_it_is_by_default(self, scene: Scene) -> None:
        with scene.open(strict=True):
            assert scene.fallbacks == [
                Fallback(
                    variable="NATS_URL",
                    value="nats://127.0.0.1:4222",
                    reason="nothing listens there, so events are not published; CELL_OS_USE_NOOP_SINK=1 says that this is meant",
                )
            ]

    @pytest.mark.parametrize("config", [{"record_stays": True}, {"noop_sink": True}])
    def test_where_it_was_not_looked_for_nothing_is_missing(self, scene: Scene, config: dict[str, Any]) -> None:
        with scene.open(strict=True, **config):
            assert scene.fallbacks == []

    def test_one_that_is_there(self, scene: Scene) -> None:
        with scene.open(strict=True, nats_url="nats://h") as sinks:
            assert sinks.forwards
        assert scene.fallbacks == []

    def test_a_directory_for_dead_letters_that_is_none(self, scene: Scene) -> None:
        with scene.open(noop_sink=True, dead_letters="/nowhere"):
            assert scene.fallbacks == [
                Fallback(variable="CELLOS_DLQ_DIR", value="/nowhere", reason="no such directory; make it, or correct the name")
            ]


class TestDeadLetters:
    def test_what_the_jsonl_file_does_not_take(self, scene: Scene) -> None:
        with scene.open(jsonl="/dev/full", dead_letters=str(scene.letters)) as sinks:
            emit(sinks)
        [letter] = scene.dead
        assert letter["event"] == json.loads(LINE)
        assert letter["error"].startswith("event sink: sink full: /dev/full")
        [path] = scene.letters.iterdir()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert LINE in path.read_bytes(), "the very bytes"

    def test_without_them_it_is_an_error(self, scene: Scene) -> None:
        with scene.open(jsonl="/dev/full") as sinks, pytest.raises(EventSinkError, match="sink full"):
            emit(sinks)

    def test_what_nats_does_not_acknowledge(self, scene: Scene) -> None:
        with scene.open(nats_url="nats://h", dead_letters=str(scene.letters)) as sinks:
            emit(sinks, LINE, b'{"id":"id-2"}')
            assert os.listdir(scene.letters) == [], "it may still come"
            assert sinks.finish() == Unacknowledged(events=2, dead_letters=str(scene.letters), error="event sink: no ack")
            assert sinks.finish() == Unacknowledged(events=2, dead_letters=str(scene.letters), error="event sink: no ack")
        assert [(letter["event"]["id"], letter["error"]) for letter in scene.dead] == [
            ("id-1", "event sink: no ack"),
            ("id-2", "event sink: no ack"),
        ]
        assert scene.forwarder.finished == 1

    def test_and_without_them_nothing_is_saved(self, scene: Scene) -> None:
        with scene.open(nats_url="nats://h") as sinks:
            emit(sinks)
            assert sinks.finish() == Unacknowledged(events=1, waiting=(LINE,), error="event sink: no ack")

    def test_a_directory_that_went_away(self, scene: Scene) -> None:
        with scene.open(nats_url="nats://h", dead_letters=str(scene.letters)) as sinks:
            emit(sinks)
            scene.letters.rmdir()
            assert sinks.finish().waiting == (LINE,)
