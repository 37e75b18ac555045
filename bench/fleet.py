"""What a queue in a bucket costs: claims per second, attempts for nothing, requests; over a real S3 API and over a directory.

    python bench/fleet.py [--json FILE] [--quick]

Agents are real ones, as processes; their supervisor is a program that does nothing, so what is measured is the queue. The S3 API is moto's
(cellos.testing.s3_process), which takes some milliseconds of processor time for a request: it, not the agents, says how fast S3 is here.
Requests are counted by a proxy, in runs of their own, because it slows them. Exit code 1 where a spec was run twice, or was not; slowness
is no failure.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cellos.core.objects import ObjectStore
from cellos.fleet.layout import Layout
from cellos.fleet.store import open_store
from cellos.testing.s3_proxy import proxy
from cellos.testing.s3_server import S3Server, s3_server

AGENT = [sys.executable, "-c", "from cellos.fleet.main import main; main()"]
LAYOUT = Layout("fleet")
NOTHING = "#!/bin/sh\ncat > /dev/null\n"
SPEC = {"authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["/bin/true"]}}


def document(id: str) -> bytes:
    return json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": {"id": id, **SPEC}}).encode()


class Place:
    """A bucket, and what agents need to know of it."""

    def __init__(self, bucket: str, directory: str, server: S3Server | None = None) -> None:
        self.bucket = bucket
        self.server = server
        self.variables = server.environment if server is not None else {}
        self.directory = Path(tempfile.mkdtemp(dir=directory))
        self.root = Path(bucket.removeprefix("file://")) if bucket.startswith("file://") else None
        program = self.directory / "nothing"
        program.write_text(NOTHING)
        program.chmod(0o755)

    def store(self) -> ObjectStore:
        os.environ.update(self.variables)
        return open_store(self.bucket, self.variables, request_seconds=60)

    def fill(self, ids: list[str]) -> None:
        if self.root is not None:
            place = self.root / "fleet/pending"
            place.mkdir(parents=True, exist_ok=True)
            for id in ids:
                (place / f"{id}.json").write_bytes(document(id))
            return
        assert self.server is not None
        base = self.bucket.removeprefix(f"s3://{self.server.bucket}/")
        self.server.fill({f"{base}/{LAYOUT.pending(id)}": document(id).decode() for id in ids})

    def count(self, part: str) -> int:
        if self.root is not None:
            place = self.root / "fleet" / part
            return len(os.listdir(place)) if place.exists() else 0
        store = self.store()

        async def listed() -> int:
            return sum([len(page) async for page in store.pages(LAYOUT.within(part))])

        return asyncio.run(listed())

    def receipts(self) -> list[dict[str, Any]]:
        store = self.store()

        async def read() -> list[dict[str, Any]]:
            found = []
            async for page in store.pages(LAYOUT.within("receipts")):
                for each in await asyncio.gather(*(store.read(entry.key, 1 << 20) for entry in page)):
                    assert each is not None
                    found.append(json.loads(each.body))
            return found

        return asyncio.run(read())

    @contextmanager
    def agents(self, number: int, **more: str) -> Iterator[list[Path]]:
        """Their logs."""
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "PYTHONPATH") if name in os.environ}
        ours = {
            "CELLOS_FLEET_BUCKET": self.bucket,
            "CELLOS_FLEET_SUPERVISOR": str(self.directory / "nothing"),
            "CELLOS_CELL_BACKEND": "stub",  # this host need not be able to hold a cell
            "CELLOS_FLEET_SLOTS": "1",
            "CELLOS_FLEET_POLL_INTERVAL_MS": "500",
            "CELLOS_STATE_DIR": str(self.directory / "state"),
        }
        logs, processes = [], []
        for index in range(number):
            log = self.directory / f"{index}.log"
            with log.open("w") as out:
                environment = kept | self.variables | ours | {"CELLOS_FLEET_NODE_ID": f"n{index}"} | more
                processes.append(subprocess.Popen(AGENT, env=environment, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT))
            logs.append(log)
        try:
            yield logs
        finally:
            for process in processes:
                process.send_signal(signal.SIGTERM)
            for process in processes:
                process.wait()


def wait_until_ended(place: Place, number: int) -> None:
    while place.count("completed") + place.count("failed") < number:
        time.sleep(0.5)


def drain(place: Place, agents: int, specs: int) -> dict[str, Any]:
    """Agents work off a queue. Times are those of the first and the last receipt."""
    place.fill([f"spec-{number:06}" for number in range(specs)])
    with place.agents(agents) as logs:
        wait_until_ended(place, specs)
        receipts = place.receipts()
    told = Counter(json.loads(line)["fields"]["message"] for log in logs for line in log.read_text().splitlines() if line.startswith("{"))
    times = sorted(receipt["writtenAt"] for receipt in receipts)
    seconds = _seconds(times[-1]) - _seconds(times[0])
    once = sorted(receipt["id"] for receipt in receipts) == [f"spec-{number:06}" for number in range(specs)]
    return {
        "agents": agents,
        "specs": specs,
        "each_once": once and told["running cell"] == specs,
        "per_second": round((specs - 1) / seconds, 1),
        "wasted_per_spec": round(told["spec already claimed by another node, skipping"] / specs, 3),
    }


def _seconds(text: str) -> float:
    from cellos.core.ids import unix_ns

    return unix_ns(text) / 1e9


def per_claim(place: Place, pending: int, claims: int) -> dict[str, float]:
    """One agent while so many specs wait: from its start to its first receipt, and from receipt to receipt."""
    place.fill([f"spec-{number:06}" for number in range(pending)])
    began = time.time()
    with place.agents(1):
        wait_until_ended(place, claims)
    times = sorted(_seconds(receipt["writtenAt"]) for receipt in place.receipts())
    return {"first_s": round(times[0] - began, 2), "each_ms": round((times[claims - 1] - times[0]) / (claims - 1) * 1000, 1)}


def requests(endpoint: str, place: Place) -> dict[str, Any]:
    """Counted by a proxy: of an empty poll, of one spec from its submission to its end."""
    with proxy(endpoint, lambda _method, _path: "") as between:
        place.variables = {**place.variables, "AWS_ENDPOINT_URL": between.url}
        with place.agents(1, CELLOS_FLEET_POLL_INTERVAL_MS="100", CELLOS_FLEET_LEASE_MS="600000"):
            deadline = time.monotonic() + 120
            while sum("pending" in path for _, path in between.requests) < 20 and time.monotonic() < deadline:
                time.sleep(0.1)
            looks = [path for _, path in between.requests[-15:]]
            empty = {"requests": len(looks), "lists_of_pending": sum("pending" in path for path in looks)}
            before = len(between.requests)
            asyncio.run(_hand_in(place.store()))
            while sum("DELETE" in method or "delete" in path for method, path in between.requests[before:]) < 3:
                time.sleep(0.1)
            made = [f"{method} {_part(path)}" for method, path in between.requests[before:]]
    counted = Counter(each for each in made if each != "GET pending list")
    return {"empty_polls": empty, "one_spec": sum(counted.values()), "one_spec_by_kind": dict(counted)}


async def _hand_in(store: ObjectStore) -> None:
    await store.create(LAYOUT.pending("one"), document("one"))


def _part(path: str) -> str:
    place, _, query = path.partition("?")
    if "list-type" in query:
        return next((part for part in ("pending", "claimed", "leases", "receipts") if part in query), "") + " list"
    return next((part for part in ("pending", "claimed", "leases", "receipts", "completed") if f"/{part}/" in place), "delete")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", dest="path")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    specs, agents = (200, 4) if options.quick else (2000, 8)
    sizes = (100, 2_000) if options.quick else (100, 10_000, 100_000)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        number = 0

        def in_a_directory() -> Place:
            nonlocal number
            number += 1
            return Place(f"file://{directory}/bucket-{number}", directory)

        results["drain_file"] = drain(in_a_directory(), agents, specs)
        print(f"directory: {results['drain_file']}", flush=True)
        results["per_claim_file"] = {size: per_claim(in_a_directory(), size, 100) for size in sizes}
        print(f"directory: by specs that wait: {results['per_claim_file']}", flush=True)
        try:
            import moto  # noqa: F401  # is it there?
        except ImportError:
            print("S3: left out, moto is not installed")
        else:
            with s3_server() as server:

                def in_s3() -> Place:
                    return Place(f"s3://{server.bucket}/{uuid.uuid4()}", directory, server)

                results["requests"] = requests(server.endpoint, in_s3())
                print(f"S3: {results['requests']}", flush=True)
                results["drain_s3"] = drain(in_s3(), agents, specs)
                print(f"S3: {results['drain_s3']}", flush=True)
                results["per_claim_s3"] = {size: per_claim(in_s3(), size, 100) for size in sizes}
                print(f"S3: by specs that wait: {results['per_claim_s3']}", flush=True)
    if options.path:
        Path(options.path).write_text(json.dumps(results, indent=2) + "\n")
    return 0 if all(each["each_once"] for name, each in results.items() if name.startswith("drain")) else 1


if __name__ == "__main__":
    sys.exit(main())
