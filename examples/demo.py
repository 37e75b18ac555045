"""The demo: a benign and a hostile program, each in a cell; a formation of cells under `cellos up`, to its end; and the checked records.

Everything here is done with the commands that users have: `cellos run`, `cellos events`, `cellos up`, `cellos apply`, `cellos logs`.
scripts/demo runs it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAMS = os.path.join(HERE, "demo")
PIPELINE = os.path.join(HERE, "formations", "pipeline.yaml")


class DemoError(Exception):
    """Something that the demo promises did not happen."""


def title(text: str) -> None:
    print(f"\n── {text} " + "─" * max(0, 90 - len(text)), flush=True)


def indented(text: str) -> None:
    for line in text.splitlines():
        print("  " + line, flush=True)


def call(cellos: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`cellos ARGUMENTS` in the directory of the programs."""
    print(f"$ cellos {shlex.join(arguments)}", flush=True)
    return subprocess.run(
        [cellos, *arguments], cwd=PROGRAMS, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False
    )


def run(cellos: str, *arguments: str) -> tuple[int, str]:
    """`cellos run`: shows what was printed; returns the exit code and the path of the record."""
    done = call(cellos, "run", *arguments)
    indented(done.stdout)
    indented(done.stderr)
    record = re.search(r"events (/.+\.jsonl)$", done.stderr, re.MULTILINE)
    if record is None:
        subprocess.run([cellos, "doctor"], stdin=subprocess.DEVNULL, check=False)
        raise DemoError(f"no cell was run (exit {done.returncode}); what `cellos doctor` says of this host stands above")
    return done.returncode, record[1]


def show_events(cellos: str, path: str, *, expect_sound: bool) -> None:
    """`cellos events`: the whole of a sound record, the verdict on a broken one."""
    done = call(cellos, "events", path)
    indented("\n".join(line for line in (done.stdout + done.stderr).splitlines() if expect_sound or line.startswith("chain")))
    if (done.returncode == 0) != expect_sound:
        raise DemoError(f"`cellos events` exited {done.returncode}, the chain should {'be sound' if expect_sound else 'be broken'}")


def living(name: str) -> list[int]:
    """Processes of the whole host that carry `name` in their arguments."""
    found = []
    for process in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{process}/cmdline", "rb") as file:
                if name.encode() in file.read().split(b"\0") and int(process) != os.getpid():
                    found.append(int(process))
        except OSError:
            continue  # it ended meanwhile, or is hidden from us
    return found


def show_benign(cellos: str, scratch: str) -> None:
    title("A benign program does its work")
    brought = os.path.join(scratch, "report.json")
    code, record = run(cellos, "--here", "--out", f"report.json:{brought}", "--", "python3", "benign.py")
    if code != 0 or not os.path.exists(brought):
        raise DemoError("the benign program did not finish its work")
    with open(brought, encoding="utf-8") as file:
        indented(f"brought out of the cell: {file.read()}")
    show_events(cellos, record, expect_sound=True)


def show_hostile(cellos: str, scratch: str) -> None:
    title("A hostile program tries to get out")
    daemon = f"cellos-demo-daemon-{os.getpid()}"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        print(f"(the host listens on 127.0.0.1:{port} meanwhile, and this process can reach it)")
        code, record = run(cellos, "--here", "--", "python3", "hostile.py", str(port), daemon)
    if code != 0:
        raise DemoError("an attempt of the hostile program got through")
    survivors = living(daemon)
    if survivors:
        raise DemoError(f"the daemon of the hostile program lives: {survivors}")
    indented("after the end: its daemon is gone too")
    show_events(cellos, record, expect_sound=True)

    title("The record shows whether somebody changed it")
    forged = os.path.join(scratch, "forged.jsonl")
    with open(record, encoding="utf-8") as file:
        text = file.read()
    with open(forged, "w", encoding="utf-8") as file:
        file.write(re.sub(r"hostile\.py", "harmless.py", text))
    print("(a copy, in which hostile.py is called harmless.py)")
    show_events(cellos, forged, expect_sound=False)
    print(f"\nThe true record stays: {record}")


@contextlib.contextmanager
def system(cellos: str, directory: str) -> Iterator[None]:
    """`cellos up` in a directory of its own, and everything after it speaks to that one."""
    print(f"$ cellos up --dir {shlex.quote(directory)} &", flush=True)
    command = [cellos, "up", "--dir", directory, "--bind", "127.0.0.1:0", "--json"]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    before = os.environ.get("CELLOS_STATE_DIR")
    try:
        line = process.stdout.readline()
        if not line:
            raise DemoError("`cellos up` did not start; why stands above")
        facts = json.loads(line)
        nodes = ", ".join(f"node {node['node']} with {node['slots']} slots" for node in facts["nodes"])
        indented(f"server {facts['server']}, NATS {facts['nats']}, controller, {nodes}")
        os.environ["CELLOS_STATE_DIR"] = directory
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)
        process.stdout.close()
        if before is None:
            os.environ.pop("CELLOS_STATE_DIR", None)
        else:
            os.environ["CELLOS_STATE_DIR"] = before


def show_formation(cellos: str, scratch: str) -> None:
    title("A formation: a pipeline of cells, one of them flaky, one allowed to fail")
    with system(cellos, os.path.join(scratch, "system")):
        print(f"$ cellos apply -f {os.path.relpath(PIPELINE)} --wait", flush=True)
        code = subprocess.run([cellos, "apply", "-f", PIPELINE, "--wait"], stdin=subprocess.DEVNULL, timeout=300, check=False).returncode
        if code != 0:
            call_and_show(cellos, "describe", "formation", "pipeline")
            raise DemoError(f"the formation did not reach COMPLETED (exit {code})")
        print()
        for member in ("lint", "test-flaky", "report"):
            call_and_show(cellos, "logs", f"pipeline/{member}")
        print()
        summarise(cellos)


def call_and_show(cellos: str, *arguments: str) -> None:
    done = call(cellos, *arguments)
    indented(done.stdout + done.stderr)


def summarise(cellos: str) -> None:
    """The record of every run of the formation, checked."""
    done = call(cellos, "events", "--formation", "pipeline", "--json")
    rows = [("member", "attempt", "outcome", "record", "")]
    for line in done.stdout.splitlines():
        run = json.loads(line)
        events = {event["type"].rpartition(".")[2]: event["data"] for event in run["events"]}
        verdict = run["verdict"]
        member = run["cellId"].partition(".")[2]
        attempt, outcome = events["claimed"]["attempt"], events["destroyed"]["outcome"]
        rows.append((member, str(attempt), outcome, f"{verdict['count']} events", f"chain {verdict['state']}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        indented("   ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    if done.returncode != 0 or len(rows) == 1:
        raise DemoError(f"the chains of the formation's runs do not verify (exit {done.returncode}): {done.stderr}")
    indented(f"{len(rows) - 1} runs, every chain verified")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run a benign and a hostile program in cells, then a formation, and show the records.")
    parser.add_argument("--cellos", default="cellos", help="the command to use")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="cellos-demo-") as scratch:
        try:
            show_benign(options.cellos, scratch)
            show_hostile(options.cellos, scratch)
            show_formation(options.cellos, scratch)
        except DemoError as error:
            print(f"demo: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
