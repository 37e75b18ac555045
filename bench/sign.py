"""What evidence costs: the chain and the signature of one event, against encoding and hashing the same event.

    python bench/sign.py [--json FILE] [--quick]

Prints processor time per event in us and the ratio to the baseline, `json.dumps` of the event and its SHA-256 by hashlib. The promise, at
most 60 us for chain and signature together, is of two cores that do nothing else. Then what a reader pays: verifying a signed record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable

from cellos.core import events
from cellos.core.events import Draft, RunIdentity, canonical_bytes, finished
from cellos.core.evidence.base64 import encode_url
from cellos.core.evidence.chain import Chain
from cellos.core.evidence.keys import Keyring, read_hmac_keys, read_verify_keys
from cellos.core.evidence.sign import ED25519, HMAC_SHA256, Signer
from cellos.core.evidence.verify import verify

PROMISED_US = 60.0
SEED = bytes(range(32))
RUN = RunIdentity(cell_id="bench", spec_id="bench", run_id="01900000-0000-7000-8000-000000000000", spec_hash="5e" * 32)
DRAFT = events.command_completed(
    RUN, argv=["/usr/bin/make", "-j4", "all"], exit_code=0, duration_ms=1234, signal=None, spawn_error=None, oom_killed=False
)
EVENT_ID, TIME = "01900000-0000-7000-8000-000000000001", "2026-01-02T03:04:05.000000006+00:00"


def microseconds(action: Callable[[], object], rounds: int, count: int = 1000) -> list[float]:
    """Processor time of one call, once per round."""
    times = []
    for _ in range(rounds):
        began = time.process_time()
        for _ in range(count):
            action()
        times.append((time.process_time() - began) / count * 1e6)
    return times


class Pipeline:
    """What an emitter does to a draft, with or without a signer."""

    def __init__(self, signer: Signer | None) -> None:
        self.signer = signer
        self.chain = Chain.first(RUN.run_id, RUN.spec_hash, "0f" * 32)

    def event(self, draft: Draft = DRAFT, *, final: bool = False) -> bytes:
        event = finished(Draft(draft.type, self.chain.link(draft.data, final=final)), event_id=EVENT_ID, time=TIME)
        line = canonical_bytes(event)
        self.chain.advance(line)
        return line if self.signer is None else self.signer.wrap(event, line)


def record(signer: Signer | None, length: int) -> list[bytes]:
    pipeline = Pipeline(signer)
    lines = [pipeline.event(events.started(RUN, ttl_seconds=60, isolation={}))]
    lines += [pipeline.event() for _ in range(length - 2)]
    last = events.destroyed(RUN, ttl_seconds=60, outcome="succeeded", residue_class="none")
    return [*lines, pipeline.event(last, final=True)]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer rounds")
    options = parser.parse_args()
    rounds = 5 if options.quick else 30
    results: dict[str, object] = {}
    baseline = 0.0

    def report(name: str, times: list[float], promised: float | None = None) -> None:
        median = statistics.median(times)
        promise = "" if promised is None else f"   promised {promised:.0f} us: {'kept' if median <= promised else 'MISSED'}"
        print(f"{name:44} {median:8.2f} us  min {min(times):8.2f}  {median / (baseline or median):7.1f} x{promise}")
        results[name] = {"median_us": median, "min_us": min(times), "ratio": median / (baseline or median), "promised_us": promised}

    public = encode_url(ed25519_public(SEED))
    ring = Keyring(
        ed25519=read_verify_keys(json.dumps({"k": public}).encode()), hmac=read_hmac_keys(json.dumps({"k": encode_url(SEED)}).encode())
    )
    signers = {"unsigned": None, "Ed25519": Signer("k", ED25519, SEED), "HMAC": Signer("k", HMAC_SHA256, SEED)}
    wire = json.loads(Pipeline(None).event())
    print(
        f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}; an event of {len(json.dumps(wire))} bytes"
    )
    times = microseconds(lambda: hashlib.sha256(json.dumps(wire).encode()).hexdigest(), rounds)
    baseline = statistics.median(times)
    report("json.dumps and sha256 (the baseline)", times)
    for name, signer in signers.items():
        report(f"chain, {name}", microseconds(Pipeline(signer).event, rounds), PROMISED_US)
    failures = []
    for name, signer in signers.items():
        lines = record(signer, 1000)
        times = []
        for _ in range(max(1, rounds // 10)):
            began = time.process_time()
            verified = verify(lines, ring=ring, require_signed=signer is not None).verified
            times.append((time.process_time() - began) / len(lines) * 1e6)
            if not verified:
                failures.append(f"{name}: the record does not verify")
        report(f"verify, {name}, of 1000 events", times)
    for failure in failures:
        print(f"FAILED: {failure}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"results": results, "failures": failures}, file, indent=1)
    return 1 if failures else 0


def ed25519_public(seed: bytes) -> bytes:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    return Ed25519PrivateKey.from_private_bytes(seed).public_key().public_bytes_raw()


if __name__ == "__main__":
    sys.exit(main())
