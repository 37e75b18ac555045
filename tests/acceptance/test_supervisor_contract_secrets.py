"""Secrets by the supervisor's contract: where they come from, how they reach the command, and that they stay nowhere else."""

from __future__ import annotations

import json
import os
import stat
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cellos.cli import secret

VALUE = "s3cret-Vålue-0815"
CLIENT = Path(secret.__file__).read_text()
PYTHON = "/usr/bin/python3"
GET = 'token=$("$0" -I -c "$1" get TOKEN)'
"""How a shell gets the secret at run time, with the interpreter and the client as its arguments."""
SIGNED = {
    "CELLOS_EVENT_SIGNING": "hmac",
    "CELLOS_EVENT_SIGNING_KID": "k",
    "CELLOS_EVENT_SIGNING_KEY_BASE64": "c2lnbmluZy1rZXktdmFsdWU",
}
KEYS = ("c2lnbmluZy1rZXktdmFsdWU", "signing-key-value")
BACKENDS = ["stub", pytest.param("linux", marks=pytest.mark.linux_backend)]
IDENTITY = {"kind": "federatedOidc", "provider": "github-actions", "audience": "sts", "secretRef": "TOKEN"}


def using(delivery: str, then: str) -> list[str]:
    """A command that has the secret in $token or $TOKEN, and does something with it."""
    if delivery == "env":
        return ["sh", "-c", f"token=$TOKEN; {then}"]
    return ["sh", "-c", f"{GET} && {then}", PYTHON, CLIENT]


@pytest.fixture
def holder(site: Any, tmp_path: Path) -> Any:
    """A site with a secret in a file outside of it."""
    file = tmp_path / "token"
    file.write_text(f"{VALUE}\n")
    file.chmod(0o600)
    site.variables |= {"CELLOS_BROKER": "file", "CELLOS_SECRET_FILE_TOKEN": str(file)}
    return site


class TestBrokers:
    SECRETS: dict[str, Any] = {"authority": {"secretRefs": ["api-token.v1"]}}  # noqa: RUF012

    def printed(self, site: Any, variables: dict[str, str]) -> str:
        done = site.run("/usr/bin/printenv", "api-token.v1", **self.SECRETS, variables=variables)
        assert done.returncode == 0, done.stderr
        return str(done.stdout).removesuffix("\n")

    def test_variables(self, site: Any) -> None:
        assert self.printed(site, {"CELLOS_BROKER": "env", "CELLOS_SECRET_API_TOKEN.V1": f" {VALUE}\n"}) == f" {VALUE}\n"

    @pytest.mark.parametrize(("content", "value"), [(f"{VALUE}\n", VALUE), (f"{VALUE}\n\n", f"{VALUE}\n"), ("a\n\nb", "a\n\nb")])
    def test_files(self, site: Any, content: str, value: str) -> None:
        path = site.place / "token"
        path.write_bytes(content.encode())
        assert self.printed(site, {"CELLOS_BROKER": "file", "CELLOS_SECRET_FILE_API_TOKEN.V1": str(path)}) == value

    @pytest.mark.parametrize("make", ["link", "missing", "binary", "directory"])
    def test_files_that_are_none(self, site: Any, make: str) -> None:
        path = site.place / "token"
        (site.place / "real").write_text(VALUE)
        match make:
            case "link":
                path.symlink_to(site.place / "real")
            case "binary":
                path.write_bytes(VALUE.encode() + b"\xff")
            case "directory":
                path.mkdir()
        done = site.run("true", **self.SECRETS, variables={"CELLOS_BROKER": "file", "CELLOS_SECRET_FILE_API_TOKEN.V1": str(path)})
        assert done.returncode == 1
        why = f'secret broker: read secret file for key "api-token.v1" at "{path}": '
        assert f"Error: secret api-token.v1 unresolvable via file broker: {why}" in done.stderr
        assert VALUE not in done.stderr + site.jsonl.read_text()

    def test_one_that_nobody_has(self, site: Any) -> None:
        """The default broker invents nothing."""
        done = site.run("true", **self.SECRETS)
        assert done.returncode == 1
        assert "secret api-token.v1 unresolvable via memory broker" in done.stderr
        assert "lifecycle.v1.started" not in site.types

    @pytest.mark.parametrize("name", ["PATH", "LD_PRELOAD", "CELLOS_SECRET_DELIVERY", "HOME"])
    def test_names_that_would_choose_the_program_are_refused(self, site: Any, name: str) -> None:
        site.refused(site.run("true", authority={"secretRefs": [name]}), f"a secret named {name} would decide what the command executes")


class TestGithubActions:
    @pytest.fixture
    def actions(self, site: Any, web: Any) -> Any:
        site.variables |= {
            "CELLOS_BROKER": "github-oidc",
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{web.url}/token?api-version=2",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "request-t0ken",
        }
        return site

    def test_the_identity_by_its_audience(self, actions: Any, web: Any) -> None:
        web.answers = [(200, json.dumps({"value": VALUE})), (200, json.dumps({"value": "other-value"}))]
        identity = {**IDENTITY, "audience": "https://sts.example.net/a b&c", "ttlSeconds": 30}
        done = actions.run("sh", "-c", "echo $TOKEN $OTHER", identity=identity, authority={"secretRefs": ["OTHER", "TOKEN"]})
        assert (done.returncode, done.stdout) == (0, f"{VALUE} other-value\n"), done.stderr
        paths = [path for _, path, *_ in web.requests]
        assert paths == ["/token?api-version=2&audience=https%3A%2F%2Fsts.example.net%2Fa%20b%26c", "/token?api-version=2&audience=OTHER"]
        assert {headers["authorization"] for _, _, headers, _ in web.requests} == {"Bearer request-t0ken"}
        assert actions.data("identity.v1.materialized")["identity"] == identity | {"subject": None}
        revoked = actions.data("identity.v1.revoked")
        assert (revoked["reason"], revoked["provenance"]["parentType"]) == ("teardown", "dev.cellos.events.cell.lifecycle.v1.started")
        assert actions.holding(VALUE, "request-t0ken") == []

    @pytest.mark.parametrize(
        ("answer", "text"),
        [
            ((500, f"no {VALUE} for request-t0ken"), "oidc token request returned 500: "),
            ((200, f'{{"token": "{VALUE}"}}'), "oidc token parse: "),
            ((200, f"<html>{VALUE}"), "oidc token parse: "),
            ((200, '{"value": ""}'), "(empty value for sts)"),
        ],
    )
    def test_answers_that_are_none(self, actions: Any, web: Any, answer: tuple[int, str], text: str) -> None:
        web.answers = [answer]
        done = actions.run("true", identity=IDENTITY, authority={"secretRefs": ["TOKEN"]})
        assert done.returncode == 1
        failed = actions.data("identity.v1.failed")
        assert (failed["operation"], failed["identity"]["secretRef"]) == ("materialize", "TOKEN")
        assert failed["reason"].startswith("identity TOKEN unresolvable via github-oidc broker")
        assert text in failed["reason"]
        assert f"Error: {failed['reason']}\n" in done.stderr
        assert "request-t0ken" not in done.stderr
        assert actions.holding("request-t0ken") == []

    def test_a_server_that_is_not_there(self, actions: Any) -> None:
        done = actions.run(
            "true", authority={"secretRefs": ["A"]}, variables={"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:1/?sig=request-t0ken"}
        )
        assert done.returncode == 1
        assert "secret A unresolvable via github-oidc broker: secret broker: oidc token request: " in done.stderr
        assert "request-t0ken" not in done.stderr + actions.jsonl.read_text()

    @pytest.mark.parametrize("name", ["ACTIONS_ID_TOKEN_REQUEST_URL", "ACTIONS_ID_TOKEN_REQUEST_TOKEN"])
    def test_outside_of_a_workflow(self, actions: Any, name: str) -> None:
        del actions.variables[name]
        assert f"{name} not set" in actions.run("true", authority={"secretRefs": ["A"]}).stderr


class TestRunTime:
    """The command asks for its secrets with `cellos-supervisor secret get`, which here is the one of this checkout."""

    @pytest.fixture
    def get(self, holder: Any) -> Any:
        """Run `secret get` as the command of a cell, in its environment and nothing else."""
        path = holder.commands.environment.get("PYTHONPATH", "")
        client = ["env", f"PYTHONPATH={path}", "CELLOS_DEPLOYMENT_PROFILE=portable", *holder.commands.line("cellos-supervisor")]
        how = {"run": {"secretDelivery": "runtimeBroker"}, "authority": {"secretRefs": ["TOKEN"]}}
        return lambda *words, before=(): holder.run(*before, *client, "secret", "get", *words, **how)

    def test_the_value_is_all_that_is_printed(self, get: Any) -> None:
        done = get("TOKEN")
        assert (done.returncode, done.stdout) == (0, VALUE), done.stderr

    @pytest.mark.parametrize(
        ("before", "words", "text"),
        [
            ((), ("OTHER",), 'unknown secret key "OTHER"'),
            (("env", "CELLOS_RUNTIME_SECRET_TOKEN=guessed"), ("TOKEN",), "unauthorized"),
            (("env", "-u", "CELLOS_RUNTIME_SECRET_TOKEN"), ("TOKEN",), "CELLOS_RUNTIME_SECRET_TOKEN not set"),
            (("env", "-u", "CELLOS_RUNTIME_SECRET_SOCKET"), ("TOKEN",), "CELLOS_RUNTIME_SECRET_SOCKET not set"),
            (("env", "CELLOS_RUNTIME_SECRET_SOCKET=/no/socket"), ("TOKEN",), "connect runtime secret socket /no/socket"),
            ((), (), "usage: cellos-supervisor secret get <KEY>"),
        ],
    )
    def test_what_cannot_be_had_is_told_and_nothing_printed(self, get: Any, before: Any, words: tuple[str, ...], text: str) -> None:
        done = get(*words, before=before)
        assert (done.returncode, done.stdout) == (1, "")
        assert f"Error: {text}" in done.stderr
        assert VALUE not in done.stderr

    def test_the_socket_is_gone_with_the_cell(self, holder: Any) -> None:
        done = holder.run(
            "/usr/bin/printenv",
            "CELLOS_RUNTIME_SECRET_SOCKET",
            run={"secretDelivery": "runtimeBroker"},
            authority={"secretRefs": ["TOKEN"]},
        )
        assert not Path(done.stdout.strip()).parent.exists()
        assert done.stdout.startswith("/")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("delivery", ["env", "runtimeBroker"])
class TestNowhereElse:
    """The command has the secret and uses it. Afterwards every file that the run left is searched, and every process while it runs."""

    AUTHORITY: dict[str, Any] = {"authority": {"secretRefs": ["TOKEN"]}, "identity": IDENTITY}  # noqa: RUF012

    @pytest.fixture
    def busy(self, holder: Any, backend: str) -> Any:
        """Everything that writes something down is on."""
        for name in ("dlq", "output"):
            (holder.place / name).mkdir()
        holder.variables |= SIGNED | {
            "CELLOS_CELL_BACKEND": backend,
            "CELLOS_SECRET_FILE_STS": holder.variables["CELLOS_SECRET_FILE_TOKEN"],
            "CELLOS_DLQ_DIR": str(holder.place / "dlq"),
            "CELLOS_OUTPUT_DIR": str(holder.place / "output"),
            "CELLOS_OUTPUT_EVENTS": "1",
            "CELLOS_EXPORT_DIR": str(holder.place / "out"),
            "NATS_URL": "nats://127.0.0.1:1",
            "RUST_LOG": "trace",
        }
        return holder

    @pytest.mark.parametrize(
        ("then", "sink"),
        [
            ("test ${#token} -ge 17", "events.jsonl"),
            ("test ${#token} -ge 17", "/dev/full"),
            ("exit 3", "events.jsonl"),
            ("kill -9 $$", "/dev/full"),
            ("sleep 1000", "/dev/full"),
        ],
    )
    def test_in_no_file_and_no_line(self, busy: Any, delivery: str, sink: str, then: str) -> None:
        run = {"secretDelivery": delivery, "timeoutMs": 1000 if then == "sleep 1000" else 60_000}
        done = busy.run(*using(delivery, then), run=run, **self.AUTHORITY, variables={"CELL_OS_JSONL_EVENTS": sink})
        assert done.returncode == (0 if then.startswith("test") else 1), done.stderr
        assert not any(word in done.stdout + done.stderr for word in (VALUE, *KEYS))
        assert len(list((busy.place / "dlq").iterdir())) > 8
        assert busy.holding(VALUE, *KEYS) == []

    def test_not_where_the_command_prints_it(self, busy: Any, delivery: str) -> None:
        """Only what goes straight through to who started us has it."""
        then = 'printf "<%s" "$token"; sleep 0; printf "%s>\\n" "$token"; printf %s "$token" >&2'
        done = busy.run(*using(delivery, then), run={"secretDelivery": delivery}, **self.AUTHORITY, variables={"CELLOS_RUN_ID": "r/1"})
        assert (done.returncode, done.stdout) == (0, f"<{VALUE}{VALUE}>\n")
        assert (busy.place / "output/r_1.stdout").read_text() == "<******>\n"
        assert (busy.place / "output/r_1.stderr").read_text() == "***"
        assert stat.S_IMODE((busy.place / "output/r_1.stdout").stat().st_mode) == 0o600
        output = [event["data"] for event in busy.events if event["type"].endswith("command.v1.output")]
        assert {each["stream"]: each["text"] for each in output} == {"stdout": "<******>\n", "stderr": "***"}
        assert busy.holding(VALUE, *KEYS) == []

    def test_in_no_process_but_the_commands(self, busy: Any, ends: Any, delivery: str) -> None:
        process = busy.start(*using(delivery, "echo up; sleep 1000"), run={"secretDelivery": delivery}, **self.AUTHORITY)
        ends(process)
        assert process.stdout.readline() == "up\n"
        holders, shown, ours = set(), set(), descendants(process.pid)
        for pid in filter(str.isdigit, os.listdir("/proc")):
            try:
                place = Path("/proc", pid)
                environment, line = (place / "environ").read_bytes(), (place / "cmdline").read_bytes()
            except OSError:  # gone, or not ours to look at
                continue
            if VALUE.encode() in environment:
                holders.add(int(pid))
            if VALUE.encode() in line:
                shown.add(int(pid))
        process.terminate()
        process.communicate(timeout=60)
        assert process.returncode == 143
        assert shown == set()
        assert holders <= ours - {process.pid}
        assert delivery == "env" or not holders


def descendants(pid: int) -> set[int]:
    found = {pid}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        found |= descendants(int(child))
    return found


class TestOutput:
    def test_files_hold_what_was_written_up_to_the_cap(self, site: Any) -> None:
        (site.place / "kept").mkdir()
        variables = {"CELLOS_OUTPUT_DIR": "kept", "CELLOS_OUTPUT_MAX_BYTES": "10", "CELLOS_RUN_ID": "r1"}
        done = site.run("sh", "-c", "printf 0123456789ABC; printf err >&2", variables=variables)
        assert (done.returncode, done.stdout) == (0, "0123456789ABC"), "what passes through is whole"
        assert (site.place / "kept/r1.stdout").read_text() == "0123456789"
        assert (site.place / "kept/r1.stderr").read_text() == "err"
        again = site.run("true", variables=variables)
        assert again.returncode == 1, "what was kept is not written over"
        assert "Error: CELLOS_OUTPUT_DIR: cannot make " in again.stderr

    def test_events_come_between_the_start_and_the_end_of_the_command(self, site: Any) -> None:
        path = site.written("spec.json", site.document("sh", "-c", "echo out; printf '\\377' >&2"))
        site.on(path, variables={"CELLOS_OUTPUT_EVENTS": "on"}, stderr=subprocess.DEVNULL)
        output = [event["data"] for event in site.events if event["type"].endswith("command.v1.output")]
        assert {each["stream"]: each.get("text") or each["base64"] for each in output} == {"stdout": "out\n", "stderr": "/w=="}
        kinds = [kind for kind in site.types if kind.startswith("command.") or kind.endswith("process_spawned")]
        assert kinds[-1] == "command.v1.completed"
        assert set(kinds[:-1]) == {"observability.v1.process_spawned", "command.v1.output"}

    def test_nothing_is_kept_where_nobody_asks(self, site: Any) -> None:
        site.run("echo", "out")
        assert "command.v1.output" not in site.types
