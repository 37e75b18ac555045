"""What the state of the log costs: replay, memory, lists, snapshots; against a plain msgspec decode of the same bytes in the same run.

    python bench/projection.py [--json FILE] [--quick]

Runs are of 11 events, of which 3 act, as a supervisor with one export writes them. Times are CPU time of this process. The replay is the
projection's share alone: reading from the log comes on top. Exit code 1 where the state came out wrong; slowness alone is no failure.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import sys
import time
import uuid
from collections.abc import Callable, Iterator

import msgspec

from cellos.core.events import Event
from cellos.core.ids import rfc3339
from cellos.core.projection import Projection
from cellos.core.snapshot import Position, read, write

SUBJECT = "cellos.events.v1"
PROMISED_EVENTS = 80_000
PROMISED_BYTES = 900
PROMISED_RESTORE = 5
EPOCH = 1_780_000_000_000_000_000
DIGEST = "sha256:82a1a5342dfe94c2265d095eb6bc1f57bb127433182f3540a976330e64b227bf"
_PREFIX = "dev.cellos.events.cell."
# Type and what its data says beside the run, in the order of a run.
COURSE: list[tuple[str, dict[str, object]]] = [
    ("observability.v1.network_scope", {"egressRuleCount": 1, "hasOpaqueNetworkAuthority": False}),
    ("observability.v1.dns_target_set", {"currentDigest": DIGEST, "fqdn": "declared-egress.trust.cellos.internal", "reason": "refresh"}),
    ("observability.v1.l7_egress_decision", {"action": "allow", "policyDigest": DIGEST, "sniHost": "pkg.example.org"}),
    ("lifecycle.v1.started", {"specHash": DIGEST[7:], "ttlSeconds": 300, "isolation": {"backend": "linux", "memory": 536870912}}),
    ("observability.v1.container_security", {f"cap{kind}": "0" * 16 for kind in ("Amb", "Bnd", "Eff", "Inh", "Prm")}),
    ("observability.v1.process_spawned", {"argc": 3, "program": "/bin/sh"}),
    ("command.v1.completed", {"argv": ["/bin/sh", "-c", "echo built > out.txt"], "durationMs": 4, "exitCode": 0}),
    ("observability.v1.fs_touch", {"artifactName": "out.txt", "purpose": "export", "sourcePath": "out.txt"}),
    ("export.v2.completed", {"artifactName": "out.txt", "receipt": {"bytesWritten": 6, "destination": "out.txt", "targetKind": "local"}}),
    ("compliance.v1.summary", {"commandExitCode": 0, "egressRuleCount": 1, "lifetimeTtlSeconds": 300, "secretDeliveryMode": "env"}),
    ("lifecycle.v1.destroyed", {"outcome": "succeeded", "residueClass": "none", "ttlSeconds": 300}),
]
ACTING = 3
MEMBERS_OF_A_FORMATION = 10

_encode = msgspec.json.Encoder(order="deterministic").encode


def run_events(number: int) -> Iterator[bytes]:
    """The events of one run, as they stand in the log. Every ten cells are of one formation; ids come in no order, as UUIDs do."""
    formation = uuid.UUID(int=number // MEMBERS_OF_A_FORMATION * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))
    about = {
        "cellId": f"{formation}.member-{number % MEMBERS_OF_A_FORMATION}",
        "specId": f"member-{number % MEMBERS_OF_A_FORMATION}",
        "runId": str(uuid.UUID(int=number * 0x2545F4914F6CDD1D % (1 << 128))),
        "correlation": {"formationId": str(formation), "memberId": f"member-{number % MEMBERS_OF_A_FORMATION}", "platform": "custom"},
    }
    for step, (kind, more) in enumerate(COURSE):
        data = {**about, **more, "chain": {"seq": step, "prev": DIGEST[7:]}}
        yield _encode(
            Event(
                id=str(uuid.UUID(int=number * 16 + step)),
                source="cellos-supervisor",
                type=_PREFIX + kind,
                datacontenttype="application/json",
                data=data,
                time=rfc3339(EPOCH + number * 1_000_000 + step * 1000),
            )
        )


def interleaved(first: int, runs: int, at_once: int = 20) -> list[bytes]:
    """The events of so many runs, of which some go on at the same time."""
    log: list[bytes] = []
    for start in range(first, first + runs, at_once):
        for events in zip(*(run_events(number) for number in range(start, start + at_once)), strict=True):
            log += events
    return log


def cpu(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def apply_all(projection: Projection, log: list[bytes]) -> None:
    sequence = projection.cursor
    apply = projection.apply
    for payload in log:
        sequence += 1
        apply(sequence, SUBJECT, payload, stored_ns=EPOCH + sequence)


def decode_all(log: list[bytes]) -> None:
    decode = msgspec.json.Decoder(Event).decode
    for payload in log:
        decode(payload)


class Bench:
    """All measurements, of one log that is made as it is needed: no more than some runs of it are in memory."""

    def __init__(self, *, quick: bool) -> None:
        self.cells = 20_000 if quick else 100_000
        self.results: dict[str, object] = {}
        self.failures: list[str] = []
        self.projection = Projection()
        self.replay_seconds = 0.0

    def show(self, name: str, figure: str, ratio: str = "", promise: str = "") -> None:
        print(f"{name:48} {figure:>20} {ratio:>10}{promise and '   ' + promise}")

    def replay(self) -> None:
        """Chunk by chunk, so that the log itself is not what the memory is counted for."""
        chunk = 1_000
        decoded, applied = [], []
        before = 0
        for first in range(0, self.cells, chunk):
            if first == self.cells // 5:  # what the log takes is there by now, and what it leaves behind is used again
                gc.collect()
                before = resident_bytes()
            log = interleaved(first, chunk)
            decoded.append(cpu(lambda log=log: decode_all(log)))  # type: ignore[misc]
            applied.append(cpu(lambda log=log: apply_all(self.projection, log)))  # type: ignore[misc]
        size = len(COURSE)
        average = sum(map(len, log)) / len(log)
        del log
        gc.collect()
        grown = (resident_bytes() - before) / (self.cells - self.cells // 5)
        events = self.cells * len(COURSE)
        self.replay_seconds, baseline = sum(applied), sum(decoded)
        per_event, per_decode = self.replay_seconds / events * 1e6, baseline / events * 1e6
        part = len(applied) // 5
        last = sum(applied[-part:]) / sum(applied[:part])
        self.show(f"msgspec decode, {average:.0f} bytes (the baseline)", f"{per_decode:.2f} us/event", "1.0 x")
        rate = events / self.replay_seconds
        kept = "kept" if rate >= PROMISED_EVENTS else "MISSED"
        self.show(
            f"replay, {size} events per run, {ACTING} act",
            f"{per_event:.2f} us/event",
            f"{per_event / per_decode:.1f} x",
            f"{rate:,.0f} events/s; promised {PROMISED_EVENTS:,}: {kept}",
        )
        self.show("its last fifth against its first", f"{last:.2f} x")
        kept = "kept" if grown <= PROMISED_BYTES else "MISSED"
        line = len(self.projection.cells(limit=1).parts[0])
        self.show(
            f"memory per cell, {self.cells:,} cells",
            f"{grown:.0f} bytes",
            f"{grown / line:.1f} x",
            f"of its JSON, {line}; aim {PROMISED_BYTES}: {kept}",
        )
        self.results["replay"] = {
            "events": events,
            "us_per_event": per_event,
            "baseline_us_per_event": per_decode,
            "events_per_second": rate,
            "last_to_first": last,
        }
        self.results["memory"] = {"cells": self.cells, "bytes_per_cell": grown, "json_bytes": line}
        if self.projection.applied != self.cells * ACTING or self.projection.rejected:
            self.failures.append(f"applied {self.projection.applied} of {self.cells * ACTING} events")

    def lists(self) -> None:
        projection = self.projection
        ids = [json.loads(part)["id"] for part in projection.cells(limit=self.cells).parts[:: self.cells // 1000]]
        formation = ids[len(ids) // 2].partition(".")[0]
        baseline = self._median(projection.cell, ids)
        self.results["get_us"] = baseline
        self.show("GET one (the baseline of lists)", f"{baseline:.2f} us", "1.0 x")
        rows: list[tuple[str, Callable[[str], object]]] = [
            ("page of 100, somewhere", lambda id: b",".join(projection.cells(after=id, limit=100).parts)),
            ("page of 100 destroyed", lambda id: b",".join(projection.cells(after=id, limit=100, state="destroyed").parts)),
            ("page of 100 running (there are none)", lambda id: b",".join(projection.cells(after=id, limit=100, state="running").parts)),
            ("the cells of one formation", lambda _: b",".join(projection.cells(formation=formation).parts)),
        ]
        for name, action in rows:
            took = self._median(action, ids)
            self.show(name, f"{took:.2f} us", f"{took / baseline:.0f} x")
            self.results[name] = {"us": took, "ratio": took / baseline}
        if len(projection.cells(formation=formation).parts) != MEMBERS_OF_A_FORMATION:
            self.failures.append("a formation without its cells")

    def snapshot(self) -> None:
        position = Position(stream_created="2026-01-01T00:00:00Z", sequence=self.projection.cursor, digest="0" * 64)
        frozen = []
        freezing = cpu(lambda: frozen.append(self.projection.freeze()))
        written: list[bytes] = []
        writing = cpu(lambda: written.append(write(frozen[0], position)))
        restored: list[Projection] = []
        restoring = min(cpu(lambda: restored.append(read(written[0])[0])) for _ in range(3))
        times = self.replay_seconds / restoring
        kept = "kept" if times >= PROMISED_RESTORE else "MISSED"
        self.show("freeze", f"{freezing * 1e3:.0f} ms", f"{freezing / self.replay_seconds:.3f} x")
        size = len(written[0]) / self.cells
        self.show(f"write, {size:.0f} bytes per cell", f"{writing * 1e3:.0f} ms", f"{writing / self.replay_seconds:.3f} x")
        self.show("restore", f"{restoring * 1e3:.0f} ms", f"1/{times:.0f} x", f"of the replay; promised 1/{PROMISED_RESTORE}: {kept}")
        self.results["snapshot"] = {"freeze_s": freezing, "write_s": writing, "restore_s": restoring, "replay_to_restore": times}
        if restored[0].freeze() != frozen[0] or restored[0].cells() != self.projection.cells():
            self.failures.append("a restored projection is another one")

    @staticmethod
    def _median(action: Callable[[str], object], ids: list[str]) -> float:
        """Microseconds of one call."""
        times = []
        for _ in range(5):
            began = time.process_time_ns()
            for id in ids:
                action(id)
            times.append((time.process_time_ns() - began) / 1e3 / len(ids))
        return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer cells")
    options = parser.parse_args()
    print(f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}, msgspec {msgspec.__version__}")
    bench = Bench(quick=options.quick)
    bench.replay()
    bench.lists()
    bench.snapshot()
    for failure in bench.failures:
        print(f"FAILED: {failure}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"results": bench.results, "failures": bench.failures}, file, indent=1)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
