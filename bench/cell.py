"""What a cell costs, against a plain posix_spawn of /bin/true in the same run.

    python bench/cell.py [--json FILE] [--quick]

Prints medians in ms and ratios to the baseline; the targets are what the project promises on two cores. Then it looks for anything that
1,000 runs leave behind, runs 100 cells at once (also with MALLOC_ARENA_MAX=1), and prints where the start-up time goes. Exit code 1 where
something was lost or left behind; slowness alone is no failure.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

SPEC = {
    "apiVersion": "cellos.io/v1",
    "kind": "ExecutionCell",
    "spec": {"id": "bench", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": ["/bin/true"]}},
}
BIN = os.path.dirname(sys.executable)


def milliseconds(action: Callable[[], object], count: int, warm_up: int = 3) -> list[float]:
    """Duration of each of `count` calls, after some that do not count."""
    times = []
    for index in range(count + warm_up):
        began = time.perf_counter()
        action()
        if index >= warm_up:
            times.append((time.perf_counter() - began) * 1e3)
    return times


def plain_spawn() -> None:
    pid = os.posix_spawn("/bin/true", ["/bin/true"], {})
    if os.waitpid(pid, 0)[1]:
        raise RuntimeError("/bin/true failed")


class Bench:
    """All measurements, in one state directory of their own."""

    def __init__(self, directory: str, *, quick: bool) -> None:
        self.directory = directory
        self.quick = quick
        self.environment = {"PATH": os.environ.get("PATH", "/usr/bin:/bin"), "CELLOS_STATE_DIR": f"{directory}/state"}
        self.spec = f"{directory}/spec.json"
        with open(self.spec, "w") as file:
            json.dump(SPEC, file)
        self.results: dict[str, object] = {}
        self.failures: list[str] = []
        self.baseline = 0.0

    def report(self, name: str, times: list[float], target: float | None) -> None:
        median, p95 = statistics.median(times), sorted(times)[int(len(times) * 0.95)]
        promise = "" if target is None else f"   promised {target:.0f} ms: {'kept' if median <= target else 'MISSED'}"
        print(f"{name:44} {median:8.2f} ms  p95 {p95:8.2f}  {median / self.baseline:7.1f} x{promise}")
        self.results[name] = {"median_ms": median, "p95_ms": p95, "ratio": median / self.baseline, "promised_ms": target}

    def command(self, *argv: str, **extra: str) -> Callable[[], None]:
        def run() -> None:
            nowhere = subprocess.DEVNULL  # pipes, and reading them, would be part of what is measured
            done = subprocess.run(argv, env={**self.environment, **extra}, stdin=nowhere, stdout=nowhere, stderr=nowhere, check=False)
            if done.returncode:
                raise RuntimeError(f"{argv}: exit {done.returncode}")

        return run

    def processes(self) -> None:
        """Taken in turns: a machine that others use is now faster, now slower, and then it is so for all of them."""
        events = f"{self.directory}/events.jsonl"
        commands = (
            ("python -c pass", self.command(sys.executable, "-c", "pass"), None),
            ("cellos run -- true", self.command(f"{BIN}/cellos", "run", "--", "true"), 90),
            ("cellos-supervisor SPEC, JSONL", self.command(f"{BIN}/cellos-supervisor", self.spec, CELL_OS_JSONL_EVENTS=events), 60),
        )
        baseline: list[float] = []
        times: list[list[float]] = [[] for _ in commands]
        for turn in range(11 if self.quick else 41):
            baseline += milliseconds(plain_spawn, 5)
            for taken, (_, command, _) in zip(times, commands, strict=True):
                taken.extend(milliseconds(command, 1, warm_up=int(turn == 0)))
        self.baseline = statistics.median(baseline)
        self.report("posix_spawn /bin/true (the baseline)", baseline, None)
        for taken, (name, _, target) in zip(times, commands, strict=True):
            self.report(name, taken, target)
        python = statistics.median(times[0])
        print(f"{'':4}beside python -c pass: {', '.join(f'{statistics.median(taken) / python:.1f} x' for taken in times[1:])}")

    def warm(self) -> None:
        from warm import Warm

        with Warm(self.environment, self.directory) as warm:
            warm.run()
            before = warm.holdings()
            count = 200 if self.quick else 1000
            times = milliseconds(warm.run, count)
            self.report("run_cell in a warm process", times, 12)
            after = warm.holdings()
            grown = {key: (before[key], after[key]) for key in before if key != "resident_kib" and before[key] != after[key]}
            growth = after["resident_kib"] - before["resident_kib"]
            print(f"{'':4}{count} runs: left behind {grown or 'nothing'}; memory {before['resident_kib']} -> {after['resident_kib']} KiB")
            if grown:
                self.failures.append(f"left behind: {grown}")
            if growth > 4096:
                self.failures.append(f"memory grew by {growth} KiB")
            self.results["left behind"] = {"runs": count, "grown": grown, "memory_growth_kib": growth}
            began = time.perf_counter()
            with ThreadPoolExecutor(100) as pool:
                lost = [error for error in pool.map(lambda _: warm.attempt(), range(100)) if error]
            took = time.perf_counter() - began
            arenas = os.environ.get("MALLOC_ARENA_MAX", "default")
            print(f"{'100 cells at once':44} {took * 1e3:8.0f} ms  {100 / took:6.0f} cells/s, lost {len(lost)} (malloc arenas: {arenas})")
            self.results["100 at once"] = {"ms": took * 1e3, "lost": len(lost)}
            if lost or threading.active_count() > 1:
                self.failures.append(f"100 at once: {lost[:3]}, threads {threading.active_count()}")
            if warm.holdings()["descriptors"] != before["descriptors"]:
                self.failures.append("descriptors left after 100 at once")

    def again_with_one_arena(self) -> None:
        done = subprocess.run(
            [sys.executable, __file__, "--only-warm", *(["--quick"] if self.quick else [])],
            env={**self.environment, "MALLOC_ARENA_MAX": "1"}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        lines = done.stdout.splitlines()
        print("\n".join(line for line in lines if line.startswith("100 cells")))
        if done.returncode:
            self.failures.append(f"with MALLOC_ARENA_MAX=1: {done.stdout[-300:]} {done.stderr[-300:]}")

    def imports(self) -> None:
        """Where the start-up time of the supervisor goes: the 15 modules that take longest by themselves."""
        environment = {**self.environment, "CELL_OS_USE_NOOP_SINK": "1"}
        argv = [sys.executable, "-X", "importtime", f"{BIN}/cellos-supervisor", self.spec]
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
        rows = []
        for line in done.stderr.splitlines():
            if line.startswith("import time:") and "[us]" not in line:
                own, _, name = line.removeprefix("import time:").split("|")
                rows.append((int(own) / 1e3, name.strip()))
        total = sum(taken for taken, _ in rows)
        print(f"\nImports of cellos-supervisor: {len(rows)} modules, {total:.1f} ms (with the cost of measuring)")
        for taken, module in sorted(rows, reverse=True)[:15]:
            print(f"  {taken:6.2f} ms  {module}")
        self.results["imports"] = {"modules": len(rows), "ms": total}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--quick", action="store_true", help="fewer runs")
    parser.add_argument("--only-warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellos-bench-") as directory:
        bench = Bench(directory, quick=options.quick)
        if options.only_warm:
            bench.baseline = statistics.median(milliseconds(plain_spawn, 50))
            bench.warm()
        else:
            print(f"{platform.platform()}, {os.cpu_count()} processors, uid {os.geteuid()}, Python {platform.python_version()}")
            bench.processes()
            bench.warm()
            bench.again_with_one_arena()
            bench.imports()
    for failure in bench.failures:
        print(f"FAILED: {failure}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump({"results": bench.results, "failures": bench.failures}, file, indent=1)
    return 1 if bench.failures else 0


if __name__ == "__main__":
    sys.exit(main())
