"""What it costs to say yes to a document of 10 KB, against json.loads of the same bytes in the same run.

    python bench/admission.py [--json FILE] [--quick]

Prints medians of processor time in µs and ratios to the baseline; the whole (parse, rules, both policies) is promised within 1,500 µs.
Always exit code 0: slowness is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable

from cellos.core.documents import CellSpec, parse_execution_cell, raw_spec_hash
from cellos.core.policy import authorize, bounded, caller_refusal, read_authorization_policy, read_policy_pack, violations
from cellos.supervisor.rates import HourlyLimit

PROMISED_US = 1500
SIZE = 10_000

PACK = {
    "apiVersion": "cellos.io/v1",
    "kind": "PolicyPack",
    "spec": {
        "id": "bench",
        "version": "1.0.0",
        "placement": {"poolId": "batch"},
        "rules": {
            "maxLifetimeTtlSeconds": 3600,
            "maxMemoryMaxBytes": 1 << 30,
            "maxRunTimeoutMs": 3_600_000,
            "requireEgressDeclared": True,
            "allowedEgressHosts": ["api.example", "10.0.0.53", "*.ledger.example"],
            "requireRuntimeSecretDelivery": True,
            "requireResourceLimits": True,
            "flagDnsEgressWithoutAcknowledgment": True,
            "requireDnsEgressJustification": True,
            "secretRefAllowlist": {"default": [f"TOKEN_{number}" for number in range(20)]},
        },
    },
}
AUTHORIZATION = {
    "apiVersion": "cellos.io/v1",
    "kind": "AuthorizationPolicy",
    "spec": {"subjects": ["acme"], "allowedPools": ["batch"], "allowedPolicyPacks": ["bench"], "maxCellsPerHour": 1_000_000},
}


def document() -> bytes:
    """A document with something in every part that people fill, and so many egress rules that it has 10 KB."""
    rules: list[dict[str, object]] = []
    spec = {
        "id": "bench",
        "correlation": {"tenantId": "acme", "labels": {f"label-{number}": f"value {number}" for number in range(8)}},
        "placement": {"poolId": "batch"},
        "policy": {"packId": "bench", "packVersion": "1.0.0"},
        "run": {
            "argv": ["/usr/bin/python3", "-c", *(f"--option-{number}=value" for number in range(60))],
            "timeoutMs": 60_000,
            "limits": {"memoryMaxBytes": 1 << 29, "cpuMax": {"quotaMicros": 50_000}},
            "secretDelivery": "runtimeBroker",
        },
        "authority": {
            "filesystem": {"mounts": [{"source": f"/srv/data/{number}"} for number in range(8)]},
            "egressRules": rules,
            "secretRefs": [f"TOKEN_{number}" for number in range(20)],
            "dnsAuthority": {"hostnameAllowlist": [f"host-{number}.ledger.example" for number in range(16)]},
        },
        "lifetime": {"ttlSeconds": 600},
        "export": {"artifacts": [{"name": f"out-{number}", "path": f"/work/out/{number}"} for number in range(8)]},
    }
    whole = {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": spec}
    while len(json.dumps(whole)) < SIZE:
        rules.append({"host": f"host-{len(rules)}.ledger.example", "port": 443, "protocol": "tls"})
    return json.dumps(whole).encode()


def microseconds(action: Callable[[], object], count: int, warm_up: int = 20) -> list[float]:
    """Processor time of each of `count` calls, after some that do not count."""
    times = []
    for index in range(count + warm_up):
        began = time.process_time_ns()
        action()
        if index >= warm_up:
            times.append((time.process_time_ns() - began) / 1e3)
    return times


class Bench:
    def __init__(self, count: int, directory: str) -> None:
        self.count = count
        self.directory = directory
        self.raw = document()
        self.pack = read_policy_pack(json.dumps(PACK).encode())
        self.policy = read_authorization_policy(json.dumps(AUTHORIZATION).encode())
        self.limit = HourlyLimit(f"{directory}/rates")
        self.baseline = 0.0
        self.results: dict[str, object] = {}

    def report(self, name: str, action: Callable[[], object], promised: float | None = None) -> None:
        times = microseconds(action, self.count)
        median, p95 = statistics.median(times), sorted(times)[int(len(times) * 0.95)]
        self.baseline = self.baseline or median
        promise = "" if promised is None else f"   promised {promised:.0f} µs: {'kept' if median <= promised else 'MISSED'}"
        print(f"{name:44} {median:8.0f} µs  p95 {p95:8.0f}  {median / self.baseline:7.1f} x{promise}")
        self.results[name] = {"median_us": median, "p95_us": p95, "ratio": median / self.baseline, "promised_us": promised}

    def judge(self, spec: CellSpec) -> None:
        if authorize(self.policy, spec) or violations(self.pack, spec) or caller_refusal(self.pack, "default", spec):
            raise RuntimeError("the document of this benchmark is refused")
        bounded(self.pack, spec)

    def admit(self) -> None:
        raw_spec_hash(self.raw)
        self.judge(parse_execution_cell(self.raw).spec)

    def run(self) -> None:
        import yaml

        spec = parse_execution_cell(self.raw).spec
        block = yaml.safe_dump(json.loads(self.raw), sort_keys=False).encode()
        most = self.policy.spec.max_cells_per_hour or 0
        self.report("json.loads (the baseline)", lambda: json.loads(self.raw))
        self.report("parse and rules", lambda: parse_execution_cell(self.raw))
        self.report("authorization policy and policy pack", lambda: self.judge(spec))
        self.report("all of it, and the digest", self.admit, PROMISED_US)
        self.report("count in the hour", lambda: self.limit.admit("acme", most, time.time()))
        self.report("parse and rules, as YAML", lambda: parse_execution_cell(block, syntax="yaml"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer calls")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory:
        bench = Bench(50 if options.quick else 500, directory)
        print(f"{platform.platform()}, {os.cpu_count()} processors, Python {platform.python_version()}, {len(bench.raw)} bytes")
        bench.run()
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"results": bench.results, "failures": []}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
