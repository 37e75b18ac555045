from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.cli import secret
from cellos.ports import Listener
from cellos.supervisor.secrets import SecretSession

USAGE = "usage: cellos-supervisor secret get <KEY> (requires runtimeBroker or runtimeLeasedBroker secret delivery)"
VALUES = {"API_TOKEN": "s3cret-value", "lines": "one\ntwo\n", "beyond": 'päss ✓ "\\', "empty": "", "long": "x" * (1 << 20)}
TIMEOUT_SECONDS = 60


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory whose relative name is short enough for a socket's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CELLOS_RUNTIME_SECRET_SOCKET", raising=False)
    monkeypatch.delenv("CELLOS_RUNTIME_SECRET_TOKEN", raising=False)
    return tmp_path


@pytest.fixture
def session(here: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[SecretSession]:
    bound = socket.socket(socket.AF_UNIX)
    bound.bind("s")
    bound.listen()
    listener = Listener(descriptor=bound.detach(), path="s")
    with SecretSession(listener, VALUES, ttl_seconds=60, mode="runtimeBroker", monotonic=lambda: 0.0) as session:
        for name, value in session.environment.items():
            monkeypatch.setenv(name, value)
        yield session


@pytest.mark.parametrize("key", VALUES)
def test_the_value_as_it_is(session: SecretSession, key: str, capfdbinary: Any) -> None:
    assert secret.main(["get", key]) == 0
    assert capfdbinary.readouterr() == (VALUES[key].encode(), b"")
    session.close()
    assert session.fetched == {key}


def fails(capfd: Any, arguments: list[str], text: str) -> None:
    assert secret.main(arguments) == 1
    assert capfd.readouterr() == ("", f"Error: {text}\n")


@pytest.mark.parametrize("arguments", [[], ["get"], ["get", ""], ["get", "a", "b"], ["put", "a"], ["--help"]])
def test_usage(session: SecretSession, arguments: list[str], capfd: Any) -> None:
    fails(capfd, arguments, USAGE)


@pytest.mark.parametrize("key", ["NONE", "nön", 'q"', "\udcff"])
def test_an_error_of_the_session(session: SecretSession, key: str, capfd: Any) -> None:
    assert secret.main(["get", key]) == 1
    out, err = capfd.readouterr()
    assert out == ""
    assert err in (f'Error: unknown secret key "{key}"\n', "Error: runtime secret broker returned empty response\n")


def test_a_wrong_token(session: SecretSession, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("CELLOS_RUNTIME_SECRET_TOKEN", "wrong")
    fails(capfd, ["get", "API_TOKEN"], "unauthorized")


@pytest.mark.parametrize("value", [None, ""])
def test_without_the_variables(here: Path, value: str | None, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    if value is not None:
        monkeypatch.setenv("CELLOS_RUNTIME_SECRET_SOCKET", value)
    fails(capfd, ["get", "key"], "CELLOS_RUNTIME_SECRET_SOCKET not set")
    monkeypatch.setenv("CELLOS_RUNTIME_SECRET_SOCKET", "s")
    fails(capfd, ["get", "key"], "CELLOS_RUNTIME_SECRET_TOKEN not set")


def test_nobody_listens(session: SecretSession, capfd: Any) -> None:
    session.close()
    fails(capfd, ["get", "API_TOKEN"], "connect runtime secret socket s: Connection refused")
    Path("s").unlink()
    fails(capfd, ["get", "API_TOKEN"], "connect runtime secret socket s: No such file or directory")


def test_a_path_that_is_too_long(session: SecretSession, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    monkeypatch.setenv("CELLOS_RUNTIME_SECRET_SOCKET", "x" * 200)
    fails(capfd, ["get", "API_TOKEN"], f"connect runtime secret socket {'x' * 200}: AF_UNIX path too long")


@pytest.mark.parametrize(
    ("said", "text"),
    [
        (b"", "runtime secret broker returned empty response"),
        (b"\n", "runtime secret broker returned empty response"),
        (b"s3cret\n", "runtime secret broker returned malformed response"),
        (b'["s3cret"]\n', "runtime secret broker returned malformed response"),
        (b'{"valu":"s3cret"}\n', "runtime secret broker returned malformed response"),
        (b'{"value":"s3cr', "runtime secret broker returned malformed response"),
        (b'{"value":"\xff"}\n', "runtime secret broker returned malformed response"),
        (b'{"value":["s3cret"]}\n', "runtime secret broker returned malformed response"),
        (b'{"error":"secret expired"}\n', "secret expired"),
    ],
)
def test_what_else_a_server_may_say(here: Path, said: bytes, text: str, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    asked: list[bytes] = []

    def serve() -> None:
        connection, _ = bound.accept()
        with connection, connection.makefile("rb") as lines:
            asked.append(lines.readline())
            connection.sendall(said)

    monkeypatch.setenv("CELLOS_RUNTIME_SECRET_SOCKET", "s")
    monkeypatch.setenv("CELLOS_RUNTIME_SECRET_TOKEN", "t0ken")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind("s")
        bound.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        fails(capfd, ["get", "key"], text)
        thread.join()
    assert [json.loads(each) for each in asked] == [{"token": "t0ken", "key": "key"}]


def alone(*arguments: str, **options: Any) -> subprocess.CompletedProcess[bytes]:
    """The file as a program of its own: nothing of CellOS or of this environment can be imported."""
    call = [sys.executable, "-I", "-S", "client.py", *arguments]
    return subprocess.run(call, stdin=subprocess.DEVNULL, timeout=TIMEOUT_SECONDS, check=False, **({"capture_output": True} | options))


def test_the_file_alone_is_enough(session: SecretSession) -> None:
    shutil.copy(secret.__file__, "client.py")
    done = alone("get", "beyond")
    assert (done.returncode, done.stdout, done.stderr) == (0, VALUES["beyond"].encode(), b"")
    done = alone()
    assert (done.returncode, done.stdout, done.stderr) == (1, b"", f"Error: {USAGE}\n".encode())


def test_what_cannot_be_written_is_an_error(session: SecretSession) -> None:
    shutil.copy(secret.__file__, "client.py")
    with open("/dev/full", "wb") as full:
        done = alone("get", "API_TOKEN", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert (done.returncode, done.stderr) == (1, b"Error: cannot write to standard output: No space left on device\n")


def test_it_needs_nothing_of_ours() -> None:
    program = "import sys; import cellos.cli.secret; print(*sys.modules)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=60, check=True)
    ours = {name for name in done.stdout.split() if name.startswith(("cellos", "msgspec", "click"))}
    assert ours == {"cellos", "cellos.cli", "cellos.cli.secret"}
