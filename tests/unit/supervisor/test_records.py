from __future__ import annotations

import errno
import fcntl
import itertools
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cellos.core import events
from cellos.core.events import Draft, RunIdentity
from cellos.core.evidence import ed25519
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.keys import Keyring
from cellos.core.evidence.sign import ED25519, HMAC_SHA256, Signer
from cellos.core.evidence.verify import verify
from cellos.errors import ConfigError, HostBackendError
from cellos.eventlog.jsonl import JsonlSink
from cellos.eventlog.spool import Spool
from cellos.ports import CellBackend, EventSink, Residue
from cellos.supervisor import records
from cellos.supervisor.emitter import Emitter
from cellos.supervisor.records import Ending, RunRecord, Sweeper, hold, sweep
from cellos.testing.backend import FakeBackend

KEY = "0123456789abcdef"
RUN = RunIdentity(
    cell_id="cell-1",
    spec_id="cell-1",
    run_id="run-1",
    spec_hash="0" * 64,
    correlation={"platform": "ci", "labels": None},
    tenant_id="acme",
    placement={"poolId": "p"},
)


class Scene:
    """A state directory as a dead supervisor leaves it, and those who come after."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.runs = path / "runs"
        self.runs.mkdir()
        self.spool = path / "spool.jsonl"
        self.jsonl = path / "events.jsonl"
        self.backend = FakeBackend()
        self.warnings: list[str] = []
        self.texts: list[str] = []
        self._clock = itertools.count(10**18, 10**6)

    def record(self, **changes: Any) -> RunRecord:
        members: dict[str, Any] = {
            "key": KEY,
            "pid": 1,
            "run": RUN,
            "ttl_seconds": 60,
            "backend": "fake",
            "footprint": {"key": KEY},
            "spool": str(self.spool),
            "keep_spool": True,
        }
        return RunRecord(**{**members, **changes})

    def emitter(self, *sinks: EventSink, signer: Signer | None = None) -> Emitter:
        chain = Chain.first(RUN.run_id, RUN.spec_hash, "1" * 64)
        spool = Spool(str(self.spool))
        return Emitter(chain=chain, spool=spool, sinks=sinks, signer=signer, now_ns=lambda: next(self._clock), random=os.urandom)

    def die(self, record: RunRecord) -> None:
        """Leave a record behind, unlocked."""
        hold(str(self.runs), record).leave()

    def sweep(
        self,
        backend_of: Callable[[str], CellBackend | None] | None = None,
        *,
        signer: Signer | None = None,
        redacted_fields: frozenset[str] = frozenset(),
    ) -> list[str]:
        by = Sweeper(
            backend_of=backend_of or (lambda kind: self.backend if kind == "fake" else None),
            now_ns=lambda: next(self._clock),
            random=os.urandom,
            signer=signer,
            redacted_fields=redacted_fields,
            warn=self.warnings.append,
        )
        done = sweep(str(self.runs), by)
        self.texts = [swept.text for swept in done]
        return [swept.run_id for swept in done]

    def lines(self, path: Path) -> list[bytes]:
        return path.read_bytes().splitlines()

    @property
    def names(self) -> list[str]:
        return sorted(os.listdir(self.runs))


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


SIGNERS = {kid: Signer(kid, ED25519, bytes([number]) * 32) for number, kid in enumerate(("k1", "k2"), start=1)}
RING = Keyring(
    ed25519={
        kid: ed25519.public_key(ed25519.private_key(bytes([number]) * 32).public_key().public_bytes_raw())
        for number, kid in enumerate(SIGNERS, start=1)
    }
)
STARTED = events.started(RUN, ttl_seconds=60, isolation={"backend": "fake"})
DESTROYED = events.destroyed(RUN, ttl_seconds=60, outcome="succeeded", residue_class="none")


class TestHeldRecords:
    def test_it_says_everything_and_is_private(self, scene: Scene) -> None:
        held = hold(str(scene.runs), scene.record(jsonl="/x", jsonl_offset=7))
        assert held.path == str(scene.runs / f"{KEY}.json")
        assert os.stat(held.path).st_mode & 0o777 == 0o600
        found = json.loads(Path(held.path).read_text())
        assert found["run"]["run_id"] == "run-1"
        assert (found["key"], found["jsonl"], found["jsonlOffset"], found["keepSpool"]) == (KEY, "/x", 7, True)
        held.remove()

    def test_removing_leaves_nothing(self, scene: Scene) -> None:
        held = hold(str(scene.runs), scene.record())
        assert scene.names == [f"{KEY}.json"]
        held.remove()
        held.remove()
        assert scene.names == []

    def test_while_it_is_held_no_sweep_touches_it(self, scene: Scene) -> None:
        held = hold(str(scene.runs), scene.record())
        assert scene.sweep() == []
        assert scene.names == [f"{KEY}.json"]
        held.remove()
        assert scene.backend.calls == []

    def test_a_sweep_between_open_and_lock_takes_nothing_away(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        real, swept = fcntl.flock, []

        def flock(descriptor: int, how: int) -> None:
            if how == fcntl.LOCK_EX and not swept:
                swept.append(True)
                scene.sweep()
            real(descriptor, how)

        monkeypatch.setattr(fcntl, "flock", flock)
        held = hold(str(scene.runs), scene.record())
        assert swept
        assert scene.names == [f"{KEY}.json"]
        assert scene.sweep() == []
        held.remove()

    def test_a_directory_that_cannot_be_written(self, scene: Scene) -> None:
        with pytest.raises(ConfigError, match=r"cannot write the run record .*: No such file or directory \(os error 2\)"):
            hold(str(scene.path / "nowhere"), scene.record())

    def test_a_full_disk_leaves_nothing(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(os, "write", lambda *_: 3)
        with pytest.raises(ConfigError, match=r"No space left on device \(os error 28\)"):
            hold(str(scene.runs), scene.record())
        assert scene.names == []

    def test_it_can_say_more_later(self, scene: Scene) -> None:
        record = scene.record()
        held = hold(str(scene.runs), record)
        more = msgspec.structs.replace(record, ending=Ending(outcome="failed", reason="x" * 500))
        for each in (more, record):
            held.rewrite(each)
            assert msgspec.json.decode(Path(held.path).read_bytes(), type=RunRecord) == each
        held.remove()

    def test_where_there_is_no_room_it_stays_as_it_was(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        record = scene.record()
        held = hold(str(scene.runs), record)
        real, calls = os.pwrite, itertools.count()
        monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, data[:-9] if next(calls) == 0 else data, at))
        held.rewrite(msgspec.structs.replace(record, ending=Ending(outcome="failed", reason="full")))
        assert msgspec.json.decode(Path(held.path).read_bytes(), type=RunRecord) == record
        held.remove()

    def test_where_nothing_can_be_written_any_more_it_does_too(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        def fails(*_: object) -> int:
            raise OSError(errno.EIO, os.strerror(errno.EIO))

        record = scene.record()
        held = hold(str(scene.runs), record)
        monkeypatch.setattr(os, "pwrite", fails)
        held.rewrite(msgspec.structs.replace(record, ending=Ending(outcome="failed", reason="full")))
        assert msgspec.json.decode(Path(held.path).read_bytes(), type=RunRecord) == record
        held.remove()


class TestSweep:
    def test_nothing_to_do(self, scene: Scene) -> None:
        assert scene.sweep() == []
        assert scene.warnings == []

    def test_a_lost_run_gets_its_end(self, scene: Scene) -> None:
        scene.backend.keys.add(KEY)
        scene.emitter().emit(STARTED)
        scene.die(scene.record())
        assert scene.sweep() == ["run-1"]
        assert scene.names == []
        assert scene.backend.keys == set()
        lines = scene.lines(scene.spool)
        assert verify(lines).verified
        last = json.loads(lines[-1])
        assert last["type"] == events.DESTROYED
        assert {name: last["data"][name] for name in ("outcome", "reason", "terminalState", "residueClass", "ttlSeconds", "tenantId")} == {
            "outcome": "failed",
            "reason": "supervisor_lost",
            "terminalState": "forced",
            "residueClass": "none",
            "ttlSeconds": 60,
            "tenantId": "acme",
        }
        assert last["data"]["correlation"] == {"platform": "ci", "labels": None}

    def test_one_whose_supervisor_could_not_write_its_end_gets_that_end(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        scene.die(scene.record(ending=Ending(outcome="failed", reason="event sink: full; the command exited with status 3")))
        assert scene.sweep() == ["run-1"]
        data = json.loads(scene.lines(scene.spool)[-1])["data"]
        assert (data["outcome"], data["reason"]) == ("failed", "event sink: full; the command exited with status 3")
        assert "terminalState" not in data
        [text] = scene.texts
        assert text.startswith(
            "run run-1 (cell cell-1) could not be recorded to its end (event sink: full; the command exited with status 3);"
        )

    def test_it_is_told_which_was_missing(self, scene: Scene) -> None:
        emitter = scene.emitter()
        emitter.emit(STARTED)
        emitter.emit(DESTROYED)
        scene.die(scene.record(jsonl=str(scene.jsonl)))
        scene.sweep()
        assert scene.texts == [f"run run-1 (cell cell-1) was over, but its events may not all have been sent; {scene.jsonl} has them now"]

    def test_a_run_without_any_event_too(self, scene: Scene) -> None:
        scene.emitter()
        scene.die(scene.record())
        assert scene.sweep() == ["run-1"]
        [line] = scene.lines(scene.spool)
        assert json.loads(line)["data"]["chain"]["count"] == 1

    def test_a_run_without_a_spool_had_not_begun_or_was_wholly_told(self, scene: Scene) -> None:
        """Killed between the removal of the spool and that of the record: its end must not be told twice, and differently."""
        scene.backend.keys.add(KEY)
        scene.die(scene.record(keep_spool=False, jsonl=str(scene.jsonl)))
        assert scene.sweep() == []
        assert (scene.names, scene.warnings, scene.backend.keys) == ([], [], set())
        assert not scene.spool.exists()
        assert not scene.jsonl.exists()

    def test_a_half_written_event_is_cut(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        with scene.spool.open("ab") as file:
            file.write(b'{"specversion":"1.0","id":"to')
        scene.die(scene.record())
        scene.sweep()
        assert len(scene.lines(scene.spool)) == 2
        assert verify(scene.lines(scene.spool)).verified

    def test_what_stayed_is_named(self, scene: Scene) -> None:
        scene.backend.residue = (Residue(kind="cgroup", detail="busy"),)
        scene.emitter().emit(STARTED)
        scene.die(scene.record())
        scene.sweep()
        data = json.loads(scene.lines(scene.spool)[-1])["data"]
        assert data["residueClass"] == "documented_exception"
        assert data["residueException"] == [{"kind": "cgroup", "detail": "busy"}]

    def test_a_run_that_had_its_end_gets_no_second(self, scene: Scene) -> None:
        emitter = scene.emitter()
        emitter.emit(STARTED)
        emitter.emit(DESTROYED)
        before = scene.lines(scene.spool)
        scene.die(scene.record())
        assert scene.sweep() == ["run-1"]
        assert scene.lines(scene.spool) == before

    @pytest.mark.parametrize("kid", ["k1", "k2"])
    def test_a_signed_record_goes_on_signed(self, scene: Scene, kid: str) -> None:
        """By the key of whoever ends it, which may be another one by then."""
        emitter = scene.emitter(JsonlSink(str(scene.jsonl)), signer=SIGNERS["k1"])
        emitter.emit(STARTED)
        emitter.emit(Draft(events.FS_TOUCH, {**STARTED.data}))
        scene.die(scene.record(jsonl=str(scene.jsonl)))
        assert scene.sweep(signer=SIGNERS[kid]) == ["run-1"]
        lines = scene.lines(scene.spool)
        assert len(lines) == 3
        assert scene.lines(scene.jsonl) == lines
        [run] = verify(lines, ring=RING, require_signed=True).runs
        assert (run.state, run.signature, run.signers) == ("verified", "verified", tuple(dict.fromkeys(["k1", kid])))

    def test_a_record_that_is_not_signed_stays_so(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        scene.die(scene.record())
        assert scene.sweep(signer=SIGNERS["k1"]) == ["run-1"]
        [run] = verify(scene.lines(scene.spool), ring=RING).runs
        assert (run.state, run.signature) == ("verified", "none")

    @pytest.mark.parametrize("signer", [None, Signer("k1", HMAC_SHA256, b"another algorithm")])
    def test_a_signed_record_waits_for_somebody_who_can_sign(self, scene: Scene, signer: Signer | None) -> None:
        scene.backend.keys.add(KEY)
        scene.emitter(signer=SIGNERS["k1"]).emit(STARTED)
        before = scene.lines(scene.spool)
        scene.die(scene.record())
        assert scene.sweep(signer=signer) == []
        assert (scene.lines(scene.spool), scene.names, scene.backend.keys) == (before, [f"{KEY}.json"], set())
        [warning] = scene.warnings
        assert 'the run was signed (ed25519, key "k1"); start with its signing variables' in warning
        assert scene.sweep(signer=SIGNERS["k1"]) == ["run-1"]
        assert verify(scene.lines(scene.spool), ring=RING, require_signed=True).verified

    @pytest.mark.parametrize(("own", "by"), [({"tenantId", "labels"}, set()), (set(), {"tenantId", "labels"}), ({"tenantId"}, {"labels"})])
    def test_what_the_run_or_the_sweep_redacts_is_redacted(self, scene: Scene, own: set[str], by: set[str]) -> None:
        run = msgspec.structs.replace(RUN, correlation={"platform": "ci", "labels": {"who": "secret"}})
        scene.emitter().emit(STARTED)
        scene.die(scene.record(run=run, redacted_fields=tuple(own)))
        assert scene.sweep(redacted_fields=frozenset(by)) == ["run-1"]
        data = json.loads(scene.lines(scene.spool)[-1])["data"]
        assert (data["tenantId"], data["correlation"]) == ("[redacted]", {"platform": "ci", "labels": {}})

    def test_one_that_had_its_end_is_not_signed_again(self, scene: Scene) -> None:
        emitter = scene.emitter(signer=SIGNERS["k1"])
        emitter.emit(STARTED)
        emitter.emit(DESTROYED)
        before = scene.lines(scene.spool)
        scene.die(scene.record())
        assert scene.sweep(signer=SIGNERS["k1"]) == ["run-1"]
        assert scene.lines(scene.spool) == before

    @pytest.mark.parametrize("arrived", [0, 1, 2])
    def test_the_jsonl_file_gets_what_it_lacks_once(self, scene: Scene, arrived: int) -> None:
        scene.jsonl.write_bytes(b'{"of":"another run"}\n')
        emitter = scene.emitter()
        emitter.emit(STARTED)
        emitter.emit(Draft(events.FS_TOUCH, {**STARTED.data}))
        with scene.jsonl.open("ab") as file:
            file.writelines(line + b"\n" for line in scene.lines(scene.spool)[:arrived])
        scene.die(scene.record(jsonl=str(scene.jsonl), jsonl_offset=21))
        scene.sweep()
        assert scene.lines(scene.jsonl)[1:] == scene.lines(scene.spool)
        assert verify(scene.lines(scene.spool)).verified

    def test_a_jsonl_file_that_was_replaced_gets_everything(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        scene.die(scene.record(jsonl=str(scene.jsonl), jsonl_offset=10_000))
        scene.sweep()
        assert scene.lines(scene.jsonl) == scene.lines(scene.spool)

    def test_a_spool_that_is_only_a_step_on_the_way_goes(self, scene: Scene) -> None:
        scene.emitter(JsonlSink(str(scene.jsonl))).emit(STARTED)
        scene.die(scene.record(jsonl=str(scene.jsonl), keep_spool=False))
        scene.sweep()
        assert not scene.spool.exists()
        assert verify(scene.lines(scene.jsonl)).verified

    def test_what_cannot_be_done_now_is_done_next_time(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        scene.die(scene.record())
        scene.backend.fail["sweep"] = HostBackendError("busy")
        assert scene.sweep() == []
        assert scene.names == [f"{KEY}.json"]
        assert "busy" in scene.warnings[0]
        scene.backend.fail.clear()
        assert scene.sweep() == ["run-1"]
        assert scene.names == []

    def test_it_is_told_how_to_get_rid_of_what_cannot_be_finished(self, scene: Scene) -> None:
        scene.emitter().emit(STARTED)
        scene.die(scene.record(jsonl="/nowhere/x"))
        assert scene.sweep() == []
        path = scene.runs / f"{KEY}.json"
        [warning] = scene.warnings
        assert warning.startswith(
            f"cannot sweep {path}: event sink: jsonl open /nowhere/x: No such file or directory (os error 2); mend that,"
        )
        assert warning.endswith(f"or give the record up: remove {path} (the events are in {scene.spool})")

    def test_a_defect_in_a_backend_stops_no_new_run(self, scene: Scene) -> None:
        scene.die(scene.record())
        scene.backend.fail["sweep"] = ZeroDivisionError()
        assert scene.sweep() == []
        assert scene.names == [f"{KEY}.json"]

    def test_a_run_of_a_backend_that_is_not_here_is_left(self, scene: Scene) -> None:
        scene.die(scene.record(backend="elsewhere"))
        assert scene.sweep() == []
        assert scene.names == [f"{KEY}.json"]
        assert "elsewhere backend, which is not there" in scene.warnings[0]

    @pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"key":"x"}'])
    def test_a_broken_record_is_set_aside(self, scene: Scene, content: bytes) -> None:
        (scene.runs / "x.json").write_bytes(content)
        assert scene.sweep() == []
        assert scene.names == ["x.json.broken"]
        assert "set aside" in scene.warnings[0]
        scene.warnings.clear()
        assert scene.sweep() == []
        assert scene.warnings == []

    def test_a_link_is_not_followed(self, scene: Scene) -> None:
        scene.die(scene.record())
        (scene.runs / f"{KEY}.json").rename(scene.path / "elsewhere")
        (scene.runs / "link.json").symlink_to(scene.path / "elsewhere")
        assert scene.sweep() == []
        assert scene.backend.calls == []
        assert (scene.path / "elsewhere").exists()

    def test_a_record_that_never_got_its_name_goes_without_an_event(self, scene: Scene) -> None:
        (scene.runs / f"{KEY}.new").write_bytes(b"{")
        assert scene.sweep() == []
        assert scene.names == []
        assert scene.warnings == []
        assert not scene.spool.exists()

    def test_other_files_are_none_of_its_business(self, scene: Scene) -> None:
        (scene.runs / "README").write_text("mine")
        assert scene.sweep() == []
        assert scene.names == ["README"]

    def test_many_sweeps_at_once_end_a_run_once(self, scene: Scene) -> None:
        for number in range(20):
            key = f"{number:016x}"
            (scene.path / key).touch()
            scene.die(scene.record(key=key, spool=str(scene.path / key)))
        barrier = threading.Barrier(4)
        found: list[str] = []

        def work() -> None:
            barrier.wait()
            found.extend(scene.sweep())

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 20
        assert scene.names == []
        assert scene.warnings == []
        for number in range(20):
            assert len(scene.lines(scene.path / f"{number:016x}")) == 1

    def test_the_lock_goes_with_the_process(self, scene: Scene) -> None:
        code = (
            "import os, sys, msgspec; from cellos.supervisor.records import RunRecord, hold; "
            "held = hold(sys.argv[1], msgspec.json.decode(sys.argv[2], type=RunRecord)); print(held.path); os.kill(os.getpid(), 9)"
        )
        record = msgspec.json.encode(scene.record()).decode()
        scene.spool.touch()
        done = subprocess.run([sys.executable, "-c", code, str(scene.runs), record], stdout=subprocess.DEVNULL, timeout=60, check=False)
        assert done.returncode == -9
        assert scene.names == [f"{KEY}.json"]
        assert scene.sweep() == ["run-1"]

    def test_one_that_was_swept_meanwhile(self, scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
        scene.die(scene.record())
        monkeypatch.setattr(records, "_same_file", lambda *_: False)
        assert scene.sweep() == []
        assert scene.backend.calls == []
