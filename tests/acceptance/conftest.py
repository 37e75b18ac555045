"""Programs that attack, and the two places where the tests run them; `site`, a place with a supervisor; `web`, a server."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

TIMEOUT_SECONDS = 60
PYTHON = "/usr/bin/python3"
ATTACKS = Path(__file__).parent / "attacks"


def attack_program(theme: str) -> list[str]:
    """The command line that runs attacks/<theme>.py; it needs no file of this checkout. The attack's name and arguments follow it."""
    shared = (ATTACKS / "attempt.py").read_text()
    load = f"import sys, types; m = sys.modules['attempt'] = types.ModuleType('attempt'); exec({shared!r}, m.__dict__)"
    text = (ATTACKS / f"{theme}.py").read_text()
    return [PYTHON, "-I", "-c", f"{load}; exec(compile({text!r}, {theme!r}, 'exec'))"]


@pytest.fixture(scope="session")
def attack() -> Callable[[str], list[str]]:
    return attack_program


Attempt = Callable[..., Any]


@pytest.fixture(scope="session")
def outside() -> Attempt:
    """The control: what comes of an attack in a plain process of ours. `before` starts it in its place."""

    def run(theme: str, name: str, *arguments: str, before: Sequence[str] = (), **options: Any) -> Any:
        argv = [*before, *attack_program(theme), name, *arguments]
        done = subprocess.run(
            argv, **({"stdin": subprocess.DEVNULL} | options), capture_output=True, text=True, timeout=TIMEOUT_SECONDS, check=False
        )
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    return run


@pytest.fixture
def inside(commands: Any) -> Attempt:
    """What comes of the same attack in a cell, of which nothing may stay. `options` are those of `cellos run`."""

    def run(theme: str, name: str, *arguments: str, options: Sequence[str] = (), **how: Any) -> Any:
        report = commands.cell([*attack_program(theme), name, *arguments], *options, **how)
        assert (report["code"], report["residue"]) == (0, []), report
        return json.loads(report["stdout"])

    return run


# ---------------------------------------------------------------- a place with a supervisor

PREFIX = "dev.cellos.events.cell."
SIGNED = "dev.cellos.events.signed_envelope.v1"


class Site:
    """Runs documents with `cellos-supervisor`, on the stub backend where nothing else is said, and looks at what came of them."""

    def __init__(self, commands: Any, place: Path) -> None:
        self.commands = commands
        self.place = place
        self.jsonl = place / "events.jsonl"
        self.variables = {"CELL_OS_JSONL_EVENTS": str(self.jsonl), "CELLOS_CELL_BACKEND": "stub"}

    @staticmethod
    def document(*argv: str, **spec: Any) -> dict[str, Any]:
        """A document that runs `argv` with secrets as variables; `spec` adds members, those of `run` too."""
        run = {"run": {"argv": list(argv), "secretDelivery": "env", **spec.pop("run", {})}} if argv else {}
        body = {"id": "cell-1", "authority": {}, "lifetime": {"ttlSeconds": 60}, **run, **spec}
        return {"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}

    def written(self, name: str, content: Any) -> str:
        """The path of a file with that content: bytes, text, or what becomes JSON."""
        path = self.place / name
        path.write_bytes(content if isinstance(content, bytes) else (content if isinstance(content, str) else json.dumps(content)).encode())
        return str(path)

    def run(self, *argv: str, variables: Mapping[str, str] | None = None, **spec: Any) -> subprocess.CompletedProcess[str]:
        """Run a command in a cell."""
        return self.on(self.written("spec.json", self.document(*argv, **spec)), variables=variables)

    def validate(self, *argv: str, variables: Mapping[str, str] | None = None, **spec: Any) -> subprocess.CompletedProcess[str]:
        """Check the document of a command."""
        return self.on("--validate", self.written("spec.json", self.document(*argv, **spec)), variables=variables)

    def on(self, *arguments: str, variables: Mapping[str, str] | None = None, **options: Any) -> subprocess.CompletedProcess[str]:
        """Any command line of the supervisor."""
        given = {**self.variables, **(variables or {})}
        done: subprocess.CompletedProcess[str] = self.commands.run(
            "cellos-supervisor", *arguments, variables=given, **{"cwd": self.place, **options}
        )
        return done

    def start(self, *argv: str, variables: Mapping[str, str] | None = None, **spec: Any) -> subprocess.Popen[str]:
        """Start a run and go on."""
        path = self.written("spec.json", self.document(*argv, **spec))
        given = {**self.variables, **(variables or {})}
        process: subprocess.Popen[str] = self.commands.start("cellos-supervisor", path, variables=given, cwd=self.place)
        return process

    @property
    def events(self) -> list[dict[str, Any]]:
        """The events, without their signatures."""
        lines = self.jsonl.read_bytes().splitlines() if self.jsonl.exists() else []
        return [event["data"]["event"] if event["type"] == SIGNED else event for event in map(json.loads, lines)]

    @property
    def types(self) -> list[str]:
        return [event["type"].removeprefix(PREFIX) for event in self.events]

    def data(self, kind: str) -> dict[str, Any]:
        """Data of the one event of that type."""
        [found] = [event["data"] for event in self.events if event["type"] == PREFIX + kind]
        return dict(found)

    def refused(self, done: subprocess.CompletedProcess[str], text: str, *, events: Sequence[str] = ()) -> None:
        """Exit code 1, one error in one line, no cell; of its kind only `events`; nothing stays in the state directory."""
        errors = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
        assert done.returncode == 1, (done.stdout, done.stderr)
        assert done.stdout == ""
        assert len(errors) == 1, done.stderr
        assert text in errors[0]
        assert self.types == list(events)
        assert self.left == []

    @property
    def left(self) -> list[Path]:
        """Files of the state directory."""
        return files(self.commands.state)

    def holding(self, *words: str) -> list[Path]:
        """Files of the whole site, state directory included, that hold one of the words."""
        found = [*files(self.place), *self.left]
        return [path for path in found if any(word.encode() in path.read_bytes() for word in words)]


def files(top: Path) -> list[Path]:
    return [Path(where, name) for where, _, names in os.walk(top) for name in names]


@pytest.fixture
def site(commands: Any, tmp_path: Path) -> Site:
    place = tmp_path / "site"
    place.mkdir()
    return Site(commands, place)


class Web(ThreadingHTTPServer):
    """Keeps the requests it gets. Answers with `answers`, each a status and a body, one after the other; then with 200 and nothing."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Exchange)
        self.answers: list[tuple[int, str]] = []
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        """Method, path, headers by their lower-case names, body."""
        self.url = f"http://127.0.0.1:{self.server_port}"


class _Exchange(BaseHTTPRequestHandler):
    server: Web

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", "0")))
        headers = {name.lower(): value for name, value in self.headers.items()}
        self.server.requests.append((self.command, self.path, headers, body))
        status, answer = self.server.answers.pop(0) if self.server.answers else (200, "")
        self.send_response(status)
        self.send_header("Content-Length", str(len(answer.encode())))
        self.end_headers()
        self.wfile.write(answer.encode())

    do_PUT = do_GET  # noqa: N815  # name of the library

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # name of the library
        """Nobody reads it."""


@pytest.fixture
def web() -> Iterator[Web]:
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()
