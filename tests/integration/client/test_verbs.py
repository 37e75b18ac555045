"""`cellos get`, `apply`, `delete` and `events --follow` against a server of the tests' own."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import socket
import subprocess
import threading
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from starlette.responses import JSONResponse, Response
from starlette.websockets import WebSocket

ID = "0198f0c4-7d5e-4a31-9c55-8a5d1f0e2b11"
CELL = {
    "id": "build\x1b[31m",
    "spec_id": "build",
    "state": "destroyed",
    "status": "destroyed",
    "formation_id": None,
    "started_at": "2026-11-21T14:03:12.120999999+00:00",
    "destroyed_at": "2026-11-21T14:03:13Z",
    "outcome": "succeeded",
    "exit_code": 0,
    "new_member": {"x": [1]},
}
FORMATION = {"id": ID, "name": "demo", "status": "PENDING", "document": {"name": "demo", "members": [{"id": "a"}, {"id": "b"}]}}
MADE = {"id": ID, "name": "demo", "status": "PENDING"}


class Shell:
    """Types `cellos …` for the server of the test."""

    def __init__(self, commands: Any, variables: dict[str, str]) -> None:
        self.commands = commands
        self.variables = variables

    def __call__(self, *arguments: str, text: str = "", **variables: str) -> subprocess.CompletedProcess[str]:
        """Into pipes."""
        with self.start(*arguments, stdin=subprocess.PIPE, variables=variables) as process:
            out, err = process.communicate(text, timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def start(
        self, *arguments: str, stdin: int = subprocess.DEVNULL, stdout: int = subprocess.PIPE, variables: dict[str, str] | None = None
    ) -> Any:
        return self.commands.start("cellos", *arguments, variables=self.variables | (variables or {}), stdin=stdin, stdout=stdout)

    def on_a_terminal(self, *arguments: str, **variables: str) -> tuple[int, str, str]:
        """Exit code, what the terminal shows, and standard error."""
        ours, theirs = pty.openpty()
        with self.start(*arguments, stdout=theirs, variables=variables) as process:
            os.close(theirs)
            shown = b""
            try:
                while data := os.read(ours, 65536):
                    shown += data
            except OSError:  # EIO: nobody has the other end any more
                pass
            os.close(ours)
            _, err = process.communicate(timeout=60)
        return process.returncode, shown.decode().replace("\r\n", "\n"), err


@pytest.fixture
def cellos(plane: Any, token: str, commands: Any) -> Shell:
    return Shell(commands, {"CELLOS_SERVER": plane.address.url, "CELLOS_SERVER_API_TOKEN": token})


class TestGet:
    def test_a_table_on_a_terminal(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [[CELL, {"id": "b", "status": "running"}]]
        code, shown, err = cellos.on_a_terminal("get", "cells", NO_COLOR="1")
        assert (code, err) == (0, "")
        assert shown.splitlines() == [
            "ID              STATE       OUTCOME     EXIT   FORMATION   STARTED               DESTROYED",
            r"build\x1b[31m   destroyed   succeeded   0      -           2026-11-21 14:03:12   2026-11-21 14:03:13",
            "b               running     -           -      -           -                     -",
        ]

    def test_formations_in_colour(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [{"formations": [FORMATION], "cursor": 3}]
        code, shown, _ = cellos.on_a_terminal("get", "formations")
        assert (code, shown.splitlines()) == (
            0,
            ["NAME   STATUS    MEMBERS   ID", f"demo   \x1b[94mPENDING\x1b[0m   2         {ID}"],
        )

    def test_json_in_a_pipe_is_what_the_server_has(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [{"cells": [CELL], "cursor": 3}]
        done = cellos("get", "cells", "--state", "DESTROYED", "--formation", ID, "--limit", "7")
        assert (done.returncode, json.loads(done.stdout), done.stderr) == (0, [CELL], "")
        assert plane.seen[0].target == f"/v1/cells?state=destroyed&formation={ID}&limit=7"

    def test_json_on_a_terminal(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [FORMATION]
        code, shown, _ = cellos.on_a_terminal("get", "formation", "demo", "--json")
        assert (code, json.loads(shown)) == (0, FORMATION)
        assert plane.seen[0].target == "/v1/formations/by-name/demo"

    def test_one_of_them(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [CELL, FORMATION]
        assert json.loads(cellos("get", "cell", "a/b").stdout) == CELL
        assert cellos.on_a_terminal("get", "formations", ID, NO_COLOR="")[1].splitlines()[1].startswith("demo   PENDING")
        assert [each.target for each in plane.seen] == ["/v1/cells/a%2Fb", f"/v1/formations/{ID}"]

    def test_none(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [[]]
        assert cellos("get", "cells").stdout == "[]\n"
        assert cellos.on_a_terminal("get", "cells") == (0, "", "no cells\n")

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["pods"], "'pods' is nothing that can be listed; there are cells, formations, nodes"),
            (["cells", "x", "--limit", "1"], "choose from a list"),
            (["formations", "--state", "running"], "choose cells"),
            (["cells", "--state", "asleep"], "'asleep' is not one of"),
        ],
    )
    def test_wrong_usage(self, cellos: Shell, arguments: list[str], words: str) -> None:
        done = cellos("get", *arguments)
        assert (done.returncode, done.stdout) == (2, "")
        assert words in done.stderr

    def test_names_may_be_any_bytes(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [[]]
        assert cellos("get", "cell", "\udcff").returncode == 1
        assert [each.target for each in plane.seen] == ["/v1/cells/%FF"]

    def test_cells_of_a_formation_that_is_named(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [FORMATION, [CELL]]
        assert json.loads(cellos("get", "cells", "--formation", "demo").stdout) == [CELL]
        assert [each.target for each in plane.seen] == ["/v1/formations/by-name/demo", f"/v1/cells?formation={ID}"]

    def test_a_refusal(self, cellos: Shell, plane: Any, refuse: Any) -> None:
        plane.answers = [refuse("not-found", "formation 'x' not found")]
        done = cellos("get", "formations", "x")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "cellos: server: Not Found: formation 'x' not found\n")

    def test_the_token_is_not_taken(self, cellos: Shell, tmp_path: Path) -> None:
        (tmp_path / "token").write_text("other\n")
        done = cellos("get", "cells", "--token-file", str(tmp_path / "token"))
        assert done.stderr == (
            "cellos: server: Unauthorized: invalid token; give another token with --token-file or CELLOS_SERVER_API_TOKEN\n"
        )

    def test_nobody_is_there(self, cellos: Shell) -> None:
        with socket.socket() as taken:  # and nobody listens
            taken.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{taken.getsockname()[1]}"
            done = cellos("get", "cells", "--server", url)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr == f"cellos: server: no answer from {url}: Connection refused (os error 111); start one: cellos up\n"

    def test_somebody_else_is_there(self, cellos: Shell) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            url = f"http://127.0.0.1:{other.getsockname()[1]}"
            greeter = threading.Thread(target=_greet, args=(other,))
            greeter.start()
            done = cellos("get", "cells", "--server", url)
            other.shutdown(socket.SHUT_RDWR)
            greeter.join()
        assert done.returncode == 1
        assert done.stderr.endswith("; something listens there, but does not answer as cellos-server does\n")

    def test_a_proxy_is_in_the_way(self, cellos: Shell) -> None:
        """It asks for a password of its own: that is no word of the control plane."""
        with socket.create_server(("127.0.0.1", 0)) as other:
            url = f"http://127.0.0.1:{other.getsockname()[1]}"
            proxy = threading.Thread(target=_greet, args=(other, b"HTTP/1.1 407 Who are you?\r\nContent-Length: 0\r\n\r\n"))
            proxy.start()
            done = cellos("get", "cells", "--server", "http://plane.invalid", http_proxy=url)
            other.shutdown(socket.SHUT_RDWR)
            proxy.join()
        assert (done.returncode, done.stdout) == (1, "")
        refused = f"no answer from http://plane.invalid: 407 Proxy Authentication Required (through the proxy {url})"
        assert done.stderr.startswith(f"cellos: server: {refused}; the proxy refused it: see HTTP_PROXY and HTTPS_PROXY ")


def _greet(listener: socket.socket, greeting: bytes = b'INFO {"server_id":"x"}\r\n') -> None:
    """As NATS does: whoever connects is told something, whatever was asked."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        with connection, contextlib.suppress(ConnectionError):  # who has read enough may be gone
            connection.sendall(greeting)
            connection.recv(65536)


class TestApply:
    YAML = "name: demo\ncoordinator: a\nmembers:\n- id: a\n"

    def test_yaml_from_a_file(self, plane: Any, cellos: Shell, tmp_path: Path) -> None:
        (tmp_path / "f.yaml").write_text(self.YAML)
        plane.answers = [lambda _: JSONResponse(MADE, 201)]
        done = cellos("apply", "-f", str(tmp_path / "f.yaml"))
        assert (done.returncode, done.stdout, done.stderr) == (0, "formation/demo created (state=PENDING)\n", "")
        (sent,) = plane.seen
        assert (sent.method, sent.target) == ("POST", "/v1/formations")
        assert json.loads(sent.body) == {"name": "demo", "coordinator": "a", "members": [{"id": "a"}]}
        assert UUID(sent.headers["idempotency-key"]).version == 7

    def test_json_from_standard_input(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [lambda _: JSONResponse(MADE, 201)]
        done = cellos("apply", "-f", "-", "--key", "mine", "--json", text='{"name":"demo" }')
        assert json.loads(done.stdout) == MADE
        assert (plane.seen[0].body, plane.seen[0].headers["idempotency-key"]) == (b'{"name":"demo" }', "mine")

    def test_a_taken_name(self, plane: Any, cellos: Shell, refuse: Any) -> None:
        plane.answers = [refuse("conflict", f"formation name 'demo' already in use by {ID}")]
        done = cellos("apply", "-f", "-", text=self.YAML)
        assert (done.returncode, done.stderr) == (1, f"cellos: server: Conflict: formation name 'demo' already in use by {ID}\n")

    def test_an_outcome_that_nobody_knows(self, plane: Any, cellos: Shell, refuse: Any) -> None:
        plane.answers = [refuse("service-unavailable", "retry later")]
        done = cellos("apply", "-f", "-", "--key", "mine", text=self.YAML)
        assert done.returncode == 1
        assert "retry later; whether it was made is not known: repeat this with --key mine" in done.stderr
        assert len(plane.seen) > 1

    @pytest.mark.parametrize("key", ["", "a b", "é", "x" * 256])
    def test_a_key_that_no_header_can_hold(self, plane: Any, cellos: Shell, key: str) -> None:
        done = cellos("apply", "-f", "-", "--key", key, text=self.YAML)
        assert (done.returncode, "--key takes 1 to 255 visible ASCII characters" in done.stderr, plane.seen) == (2, True, [])

    def test_nothing_is_sent_that_is_plainly_wrong(self, plane: Any, cellos: Shell) -> None:
        done = cellos("apply", "-f", "-", text="kind: Deployment\nname: x\n")
        assert (done.returncode, done.stderr) == (1, "cellos: -: kind is 'Deployment', not 'Formation'\n")
        assert plane.seen == []


class TestDelete:
    @pytest.mark.parametrize("answer", ["y", "YES", " yes "])
    def test_after_a_question(self, plane: Any, cellos: Shell, answer: str) -> None:
        plane.answers = [FORMATION, lambda _: Response(status_code=204), FORMATION | {"status": "CANCELLED"}]
        done = cellos("delete", "formation", "demo", text=f"{answer}\n")
        assert (done.returncode, done.stdout) == (0, "formation/demo deleted\n")
        assert done.stderr == "Delete formation 'demo'? This is irreversible. [y/N] "
        assert [(each.method, each.target) for each in plane.seen] == [
            (method, "/v1/formations/by-name/demo") for method in ("GET", "DELETE", "GET")
        ]

    @pytest.mark.parametrize(
        ("before", "after", "told"),
        [
            ("COMPLETED", "COMPLETED", "cellos: it had ended already (COMPLETED) and stays listed\n"),
            ("RUNNING", "RUNNING", "cellos: its cells are being ended; see: cellos wait formation demo\n"),
            ("PENDING", "CANCELLED", ""),
        ],
    )
    def test_what_became_of_it(self, plane: Any, cellos: Shell, before: str, after: str, told: str) -> None:
        plane.answers = [FORMATION | {"status": before}, lambda _: Response(status_code=204), FORMATION | {"status": after}]
        done = cellos("delete", "formation", "demo", "--yes")
        assert (done.returncode, done.stdout, done.stderr) == (0, "formation/demo deleted\n", told)

    @pytest.mark.parametrize("answer", ["", "\n", "n\n", "yesterday\n"])
    def test_not_without_a_yes(self, plane: Any, cellos: Shell, answer: str) -> None:
        done = cellos("delete", "formation", "demo", text=answer)
        assert (done.returncode, done.stdout) == (1, "")
        assert "nothing was deleted; answer y, or add --yes" in done.stderr
        assert plane.seen == []

    def test_without_a_question(self, plane: Any, cellos: Shell) -> None:
        plane.answers = [FORMATION, lambda _: Response(status_code=204)]  # what became of it cannot be told
        done = cellos("delete", "formation", ID, "-y")
        assert (done.returncode, done.stdout, done.stderr) == (0, f"formation/{ID} deleted\n", "")
        assert plane.seen[0].target == f"/v1/formations/{ID}"


class TestFollow:
    def test_json_lines_in_a_pipe_over_a_lost_connection(self, plane: Any, cellos: Shell, ends: Any) -> None:
        plane.fill(7)
        plane.streams = [plane.part(3)]
        process = cellos.start("events", "--follow", "--since", "2")
        ends(process)
        lines = [process.stdout.readline() for _ in range(5)]
        assert lines == [f'{{"seq":{seq},"event":{event.decode()}}}\n' for seq, event in plane.log[2:]]
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert process.stderr.read() == (
            f"cellos: the stream of events was closed with 1001; trying again\ncellos: connected to {plane.address.url} again\n"
        )

    def test_words_on_a_terminal_and_a_gap_that_is_told(self, plane: Any, cellos: Shell) -> None:
        kind = "dev.cellos.events.cell.formation.v1."
        data = {"formationId": ID, "formationName": "demo", "cellCount": 2}
        event = {"id": "e", "source": ID, "type": f"{kind}created", "time": "2026-11-21T14:03:12.120+00:00", "data": data}
        plane.log = [(9, json.dumps(event).encode()), (10, json.dumps(event | {"type": f"{kind}running"}).encode())]

        async def expire(socket_: WebSocket) -> None:
            await socket_.send_text('{"type":"/problems/ws/retention-exhausted","title":"…","oldest_seq":9}')
            await socket_.close(4410, "retention-exhausted")

        plane.streams = [expire, plane.part(2, 1008, "enough")]
        code, shown, err = cellos.on_a_terminal("events", "--follow", "--since", "0")
        assert (code, shown.splitlines()) == (
            1,
            [
                "2026-11-21 14:03:12.120  demo                      CREATED        2 members",
                "2026-11-21 14:03:12.120  demo                      RUNNING",
            ],
        )
        assert err.splitlines() == [
            "cellos: no events follow 0: the oldest that is left is 9; going on with the oldest there is",
            "cellos: server: /ws/events was closed: enough",
        ]
        assert [each.target for each in plane.seen] == ["/ws/events?since=0", "/ws/events?since=8"]

    def test_a_server_that_only_refuses_is_not_asked_for_ever(self, plane: Any, cellos: Shell) -> None:
        plane.streams = [plane.part(0, 4410, "retention-exhausted")] * 3
        done = cellos("events", "--follow", "--since", "5")
        assert (done.returncode, [each.method for each in plane.seen]) == (1, ["WS", "GET", "WS"])
        assert "no events follow 5: the log was made anew, or 5 is above the last, 0; going on with the oldest there is" in done.stderr

    @pytest.mark.parametrize("arguments", [["x.jsonl", "--follow"], ["--follow", "--require-signed"], ["--since", "1"], ["--server", "x"]])
    def test_wrong_usage(self, cellos: Shell, arguments: list[str]) -> None:
        done = cellos("events", *arguments)
        assert done.returncode == 2
        assert "--follow" in done.stderr


class TestCompletion:
    @pytest.mark.parametrize(
        ("words", "answer", "found"),
        [
            ("get ", None, ["cells", "formations", "nodes"]),
            ("get cells b", [CELL | {"id": "build"}, {"id": "a"}, {"id": "b"}], ["build", "b"]),
            ("get formations ", {"formations": [FORMATION, {"id": "x"}]}, ["demo", "x"]),
            ("delete formation d", {"formations": [FORMATION, {"id": "x"}]}, ["demo"]),
            ("delete ", None, ["formation"]),
        ],
    )
    def test_verbs_and_names(self, plane: Any, cellos: Shell, words: str, answer: Any, found: list[str]) -> None:
        plane.answers = [answer]
        line = f"cellos {words}"
        done = cellos(_CELLOS_COMPLETE="bash_complete", COMP_WORDS=line, COMP_CWORD=str(len(line.split(" ")) - 1))
        assert (done.returncode, done.stderr) == (0, "")
        assert [each.partition(",")[2] for each in done.stdout.splitlines()] == found

    def test_a_server_that_does_not_answer_completes_nothing(self, plane: Any, cellos: Shell, refuse: Any) -> None:
        plane.answers = [refuse("internal", "x")]
        done = cellos(_CELLOS_COMPLETE="bash_complete", COMP_WORDS="cellos get cells ", COMP_CWORD="3")
        assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")
