"""Secrets as a user meets them: where they come from, how they reach the program, and where they never are."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cellos.cli import secret

pytestmark = pytest.mark.linux_backend

PREFIX = "dev.cellos.events.cell."
VALUE = "s3cret-Value-0815"
PYTHON = "/usr/bin/python3"
CLIENT = Path(secret.__file__).read_text()
FETCH = [PYTHON, "-I", "-c", CLIENT, "get"]
"""The client, brought along as an argument."""
FROM_ENV = {"CELLOS_BROKER": "env", "CELLOS_SECRET_API_TOKEN": VALUE}


def document(*argv: str, delivery: str | None = "runtimeBroker", keys: tuple[str, ...] = ("API_TOKEN",), **spec: Any) -> str:
    run: dict[str, Any] = {"argv": list(argv)} | ({"secretDelivery": delivery} if delivery else {})
    authority = {"secretRefs": list(keys)} | spec.pop("authority", {})
    body = {"id": "cell-1", "authority": authority, "lifetime": {"ttlSeconds": 60}, "run": run, **spec}
    return json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body})


class Supervisor:
    """Runs documents and reads what came of them."""

    def __init__(self, commands: Any, place: Path) -> None:
        self.commands = commands
        self.place = place
        self.jsonl = place / "events.jsonl"

    def __call__(self, text: str, *, cwd: Path | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        spec = self.place / "spec.json"
        spec.write_text(text)
        given = {"CELL_OS_JSONL_EVENTS": str(self.jsonl)} | variables
        done: subprocess.CompletedProcess[str] = self.commands.run("cellos-supervisor", str(spec), variables=given, cwd=cwd or self.place)
        return done

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.jsonl.read_text().splitlines()] if self.jsonl.exists() else []

    @property
    def types(self) -> list[str]:
        return [event["type"].removeprefix(PREFIX) for event in self.events]

    def data(self, kind: str) -> dict[str, Any]:
        [found] = [event["data"] for event in self.events if event["type"] == PREFIX + kind]
        return dict(found)

    def files(self) -> list[Path]:
        """Everything that was written down, events and spools and records alike."""
        return [Path(where, name) for top in (self.place, self.commands.state) for where, _, names in os.walk(top) for name in names]


@pytest.fixture
def supervisor(commands: Any, tmp_path: Path) -> Supervisor:
    place = tmp_path / "place"
    place.mkdir()
    return Supervisor(commands, place)


class TestBrokers:
    def test_env(self, supervisor: Supervisor) -> None:
        done = supervisor(document(*FETCH, "api-token", keys=("api-token",)), **FROM_ENV)
        assert (done.returncode, done.stdout) == (0, VALUE), done.stderr

    def test_file(self, supervisor: Supervisor, tmp_path: Path) -> None:
        (tmp_path / "token").write_text(VALUE + "\n")
        done = supervisor(document(*FETCH, "API_TOKEN"), CELLOS_BROKER="file", CELLOS_SECRET_FILE_API_TOKEN=str(tmp_path / "token"))
        assert (done.returncode, done.stdout) == (0, VALUE), done.stderr

    @pytest.mark.parametrize("delivery", ["env", "runtimeBroker"])
    @pytest.mark.parametrize(
        ("variables", "text"),
        [
            ({}, 'secret API_TOKEN unresolvable via memory broker: secret broker: no value was handed over for secret key "API_TOKEN"'),
            (
                {"CELLOS_BROKER": "env"},
                (
                    "secret API_TOKEN unresolvable via env broker: secret broker: env var CELLOS_SECRET_API_TOKEN not set"
                    ' (required for secret key "API_TOKEN")'
                ),
            ),
            ({"CELLOS_BROKER": "env", "CELLOS_SECRET_API_TOKEN": ""}, "secret API_TOKEN unresolvable via env broker"),
            (
                {"CELLOS_BROKER": "file", "CELLOS_SECRET_FILE_API_TOKEN": "/dev/null"},
                (
                    'secret API_TOKEN unresolvable via file broker: secret broker: read secret file for key "API_TOKEN" at "/dev/null":'
                    " not a regular file"
                ),
            ),
            (
                {"CELLOS_BROKER": "github-oidc"},
                (
                    "secret API_TOKEN unresolvable via github-oidc broker: secret broker: ACTIONS_ID_TOKEN_REQUEST_URL not set"
                    " — is this a GitHub Actions environment with `permissions: id-token: write`?"
                ),
            ),
        ],
    )
    def test_a_secret_that_cannot_be_had(self, supervisor: Supervisor, delivery: str, variables: dict[str, str], text: str) -> None:
        done = supervisor(document("/bin/true", delivery=delivery), **variables)
        assert done.returncode == 1
        assert f"Error: {text}\n" in done.stderr
        assert supervisor.data("lifecycle.v1.destroyed")["reason"] == text
        assert "lifecycle.v1.started" not in supervisor.types
        assert "observability.v1.process_spawned" not in supervisor.types

    @pytest.mark.parametrize(
        ("variables", "text"),
        [
            ({}, "secret broker: CELLOS_VAULT_ADDR not set"),
            ({"CELLOS_VAULT_ADDR": "http://127.0.0.1:1"}, "secret broker: CELLOS_VAULT_ROLE_ID not set"),
            (
                {"CELLOS_VAULT_ADDR": "http://127.0.0.1:1", "CELLOS_VAULT_ROLE_ID": "r", "CELLOS_VAULT_SECRET_ID": VALUE},
                "not built yet",
            ),
        ],
    )
    def test_vault_is_refused_by_name(self, supervisor: Supervisor, variables: dict[str, str], text: str) -> None:
        done = supervisor(document("/bin/true"), CELLOS_BROKER="vault-approle", **variables)
        assert done.returncode == 1
        assert text in done.stderr
        assert VALUE not in done.stderr
        assert supervisor.events == []


class TokenEndpoint(BaseHTTPRequestHandler):
    """Gives a token that names its audience, except for one."""

    def do_GET(self) -> None:
        [audience] = parse_qs(urlsplit(self.path).query)["audience"]
        authorized = self.headers["Authorization"] == f"Bearer {VALUE}"
        body = json.dumps({"value": f"token-for-{audience}"}) if authorized else "who are you?"
        if audience == "broken":
            authorized, body = False, f"cannot tell {VALUE} from others"
        self.send_response(200 if authorized else 500)
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, *words: object) -> None:
        return


class TestGithubActions:
    @pytest.fixture
    def variables(self) -> Iterator[dict[str, str]]:
        with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            url = f"http://127.0.0.1:{server.server_address[1]}/token?api-version=2.0"
            yield {"CELLOS_BROKER": "github-oidc", "ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": VALUE}
            server.shutdown()
            thread.join()

    def identity(self, audience: str) -> dict[str, str]:
        return {"kind": "federatedOidc", "provider": "github", "audience": audience, "secretRef": "ID_TOKEN"}

    def test_an_identity_by_its_audience_and_a_secret_by_its_name(self, supervisor: Supervisor, variables: dict[str, str]) -> None:
        text = document(
            "sh",
            "-c",
            "echo $ID_TOKEN $OTHER",
            delivery="env",
            keys=("ID_TOKEN", "OTHER"),
            identity=self.identity("https://sts.example.net/é"),
        )
        done = supervisor(text, **variables)
        assert (done.returncode, done.stdout) == (0, "token-for-https://sts.example.net/é token-for-OTHER\n"), done.stderr
        kinds = [kind for kind in supervisor.types if kind.startswith("identity.")]
        assert kinds == ["identity.v1.materialized", "identity.v1.revoked"]
        assert "token-for" not in supervisor.jsonl.read_text()

    def test_a_refusal_is_told_without_the_token(self, supervisor: Supervisor, variables: dict[str, str]) -> None:
        done = supervisor(document("/bin/true", keys=("ID_TOKEN",), identity=self.identity("broken")), **variables)
        why = "secret broker: oidc token request returned 500: cannot tell [masked] from others"
        text = f"identity ID_TOKEN unresolvable via github-oidc broker: {why}"
        assert done.returncode == 1
        assert f"Error: {text}\n" in done.stderr
        failed = supervisor.data("identity.v1.failed")
        assert (failed["operation"], failed["reason"]) == ("materialize", text)
        assert VALUE not in done.stderr + supervisor.jsonl.read_text()


class TestDelivery:
    def test_as_variables(self, supervisor: Supervisor) -> None:
        done = supervisor(document("env", delivery="env"), **FROM_ENV)
        assert done.returncode == 0, done.stderr
        found = dict(line.split("=", 1) for line in done.stdout.splitlines())
        assert found["API_TOKEN"] == VALUE
        assert not [name for name in found if name.startswith("CELLOS_")]

    def test_at_run_time(self, supervisor: Supervisor) -> None:
        done = supervisor(document("env"), **FROM_ENV)
        assert done.returncode == 0, done.stderr
        found = dict(line.split("=", 1) for line in done.stdout.splitlines())
        assert found["CELLOS_SECRET_DELIVERY"] == "runtimeBroker"
        assert {name for name in found if "CELLOS" in name} == {
            "CELLOS_SECRET_DELIVERY",
            "CELLOS_RUNTIME_SECRET_SOCKET",
            "CELLOS_RUNTIME_SECRET_TOKEN",
        }
        assert VALUE not in done.stdout

    @pytest.mark.parametrize("delivery", ["runtimeLeasedBroker", None])
    def test_no_broker_that_is_built_has_leases(self, supervisor: Supervisor, delivery: str | None) -> None:
        done = supervisor(document("/bin/true", delivery=delivery), **FROM_ENV)
        assert done.returncode == 1
        text = "runtime leased broker prepare: secret broker: runtimeLeasedBroker is not supported by this secret broker"
        assert text in done.stderr

    def test_an_unknown_key(self, supervisor: Supervisor) -> None:
        done = supervisor(document(*FETCH, "OTHER"), **FROM_ENV)
        assert (done.returncode, done.stdout) == (1, "")
        assert 'Error: unknown secret key "OTHER"\n' in done.stderr

    def test_an_identity_is_fetched_by_its_audience_and_has_its_own_time(self, supervisor: Supervisor) -> None:
        identity = {
            "kind": "federatedOidc",
            "provider": "github",
            "audience": "sts",
            "secretRef": "API_TOKEN",
            "ttlSeconds": 30,
        }
        done = supervisor(
            document(*FETCH, "API_TOKEN", identity=identity), CELLOS_BROKER="env", CELLOS_SECRET_STS=VALUE, CELLOS_SECRET_API_TOKEN="other"
        )
        assert (done.returncode, done.stdout) == (0, VALUE), done.stderr

    def test_the_use_that_is_reported_was_measured(self, supervisor: Supervisor) -> None:
        variables = FROM_ENV | {"CELLOS_SECRET_OTHER": "other"}
        reports = []
        for key in ("API_TOKEN", "nothing"):
            supervisor(document(*FETCH, key, keys=("API_TOKEN", "OTHER")), **variables)
            reports.append(supervisor.data("authority.v1.homeostasis"))
            supervisor.jsonl.unlink()
        assert [report["declaredSecretCount"] for report in reports] == [2, 2]
        assert reports[0]["recommendedRemovals"] != reports[1]["recommendedRemovals"]


class TestClient:
    def test_the_command_itself(self, commands: Any) -> None:
        done = commands.run("cellos-supervisor", "secret", "get", "API_TOKEN")
        assert (done.returncode, done.stdout, done.stderr) == (1, "", "Error: CELLOS_RUNTIME_SECRET_SOCKET not set\n")

    @pytest.mark.parametrize("arguments", [["secret"], ["secret", "get"], ["secret", "put", "KEY"]])
    def test_usage(self, commands: Any, arguments: list[str]) -> None:
        done = commands.run("cellos-supervisor", *arguments)
        usage = "usage: cellos-supervisor secret get <KEY> (requires runtimeBroker or runtimeLeasedBroker secret delivery)"
        assert (done.returncode, done.stdout, done.stderr) == (1, "", f"Error: {usage}\n")

    def test_the_file_shown_to_a_cell(self, supervisor: Supervisor, tmp_path: Path) -> None:
        shutil.copy(secret.__file__, tmp_path / "secret.py")
        (tmp_path / "secret.py").chmod(0o644)
        mounts = {"filesystem": {"mounts": [{"source": str(tmp_path / "secret.py"), "target": "/opt/cellos/secret.py"}]}}
        done = supervisor(document("sh", "-c", 'echo "<$(python3 /opt/cellos/secret.py get API_TOKEN)>"', authority=mounts), **FROM_ENV)
        assert (done.returncode, done.stdout) == (0, f"<{VALUE}>\n"), done.stderr


@pytest.mark.parametrize("delivery", ["env", "runtimeBroker"])
class TestWhereItNeverIs:
    """A run in which the program uses its secret without printing it: whoever looks at what the run left finds nothing."""

    def program(self, delivery: str, *, then: str = "") -> str:
        if delivery == "env":
            return document("sh", "-c", f"test ${{#API_TOKEN}} = {len(VALUE)} {then}", delivery=delivery)
        script = f'token=$("$0" -I -c "$1" get API_TOKEN) && test ${{#token}} = {len(VALUE)} {then}'
        return document("sh", "-c", script, PYTHON, CLIENT, delivery=delivery)

    def test_in_nothing_that_was_written(self, supervisor: Supervisor, delivery: str, tmp_path: Path) -> None:
        (tmp_path / "dlq").mkdir()
        done = supervisor(self.program(delivery), CELLOS_DLQ_DIR=str(tmp_path / "dlq"), **FROM_ENV)
        assert (done.returncode, done.stdout) == (0, ""), done.stderr
        assert VALUE not in done.stderr
        assert supervisor.types[-1] == "lifecycle.v1.destroyed"
        self.look(supervisor, tmp_path)

    def test_in_nothing_that_a_failed_run_wrote(self, supervisor: Supervisor, delivery: str, tmp_path: Path) -> None:
        done = supervisor(self.program(delivery, then="&& exit 3"), **FROM_ENV)
        assert done.returncode == 1
        assert VALUE not in done.stdout + done.stderr
        assert supervisor.data("lifecycle.v1.destroyed")["reason"] == "command exited with status 3"
        self.look(supervisor, tmp_path)

    def test_in_no_file_when_there_is_no_sink_but_the_spool(
        self, supervisor: Supervisor, delivery: str, tmp_path: Path, commands: Any
    ) -> None:
        spec = tmp_path / "spec.json"
        spec.write_text(self.program(delivery))
        done = commands.run("cellos-supervisor", str(spec), variables={"CELL_OS_USE_NOOP_SINK": "1", **FROM_ENV})
        assert done.returncode == 0, done.stderr
        assert VALUE not in done.stdout + done.stderr
        self.look(supervisor, tmp_path)

    def look(self, supervisor: Supervisor, *others: Path) -> None:
        found = {path for top in others for path in top.rglob("*") if path.is_file()} | set(supervisor.files())
        assert found
        assert [path for path in found if VALUE.encode() in path.read_bytes()] == []

    def test_in_no_other_process(self, supervisor: Supervisor, delivery: str, commands: Any, ends: Any, tmp_path: Path) -> None:
        """While the program runs, of all processes of this host only the supervisor has it in its environment, and none as an argument."""
        spec = tmp_path / "spec.json"
        spec.write_text(self.program(delivery, then="&& echo ready && sleep 1000"))
        variables = {"CELL_OS_JSONL_EVENTS": str(supervisor.jsonl), **FROM_ENV}
        process = commands.start("cellos-supervisor", str(spec), variables=variables)
        ends(process)
        assert process.stdout.readline() == "ready\n"
        holders, arguments = set(), set()
        for entry in filter(str.isdigit, os.listdir("/proc")):
            try:
                environment, line = Path(f"/proc/{entry}/environ").read_bytes(), Path(f"/proc/{entry}/cmdline").read_bytes()
            except OSError:  # gone, or not ours to look at
                continue
            if VALUE.encode() in environment:
                holders.add(int(entry))
            if VALUE.encode() in line:
                arguments.add(int(entry))
        process.terminate()
        assert process.wait(60) == 143
        assert arguments == set()
        outside = {pid for pid in holders if pid == process.pid}
        assert outside == {process.pid}
        inside = holders - outside
        assert bool(inside) == (delivery == "env"), "the cell's own processes have it only where it is delivered as a variable"
        self.look(supervisor, tmp_path)
