"""What every SecretBroker promises, asked of each."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import pytest

from cellos.brokers.env import EnvBroker
from cellos.brokers.file import FileBroker
from cellos.brokers.github_oidc import GithubOidcBroker
from cellos.brokers.memory import MemoryBroker
from cellos.errors import SecretBrokerError
from cellos.ports import SecretBroker

CELL = "cell-1"
VALUES = {
    "plain": "s3cret-value",
    "dotted.key_with-marks": "another",
    "blanks": "  kept \t",
    "lines": "one\ntwo\r\n\nthree",
    "ends-with-line-feed": "one\n",
    "beyond-ascii": "pässwörd ✓ \U0001d518 \u2028",
    "quotes": '"\\{"value":1}\'$(id)%s',
    "empty": "",
    "long": "x" * 20_000,
}


class Subject:
    """A broker that holds VALUES, and every text of its making that somebody could see."""

    def __init__(self, broker: SecretBroker, name: str) -> None:
        self.broker = broker
        self.name = name

    def refusal(self, key: str) -> str:
        with pytest.raises(SecretBrokerError) as caught:
            self.broker.resolve(key, cell_id=CELL)
        return str(caught.value)


def of_memory(place: Path) -> SecretBroker:
    return MemoryBroker(VALUES)


def of_env(place: Path) -> SecretBroker:
    return EnvBroker({"CELLOS_SECRET_" + key.upper().replace("-", "_"): value for key, value in VALUES.items()})


def of_file(place: Path) -> SecretBroker:
    variables = {}
    for key, value in VALUES.items():
        (place / key).write_bytes(value.encode() + b"\n")
        variables["CELLOS_SECRET_FILE_" + key.upper().replace("-", "_")] = str(place / key)
    return FileBroker(variables)


class TokenEndpoint(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        [audience] = parse_qs(urlsplit(self.path).query)["audience"]
        known = audience in VALUES
        body = json.dumps({"value": VALUES[audience]} if known else {"message": "no such audience"}).encode()
        self.send_response(200 if known else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *words: object) -> None:
        return


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), TokenEndpoint) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}/token?api-version=2.0"
        server.shutdown()
        thread.join()


MAKERS: dict[str, Callable[[Path], SecretBroker]] = {"memory": of_memory, "env": of_env, "file": of_file}


@pytest.fixture(params=[*MAKERS, "github-oidc"])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    name = str(request.param)
    if name == "github-oidc":
        url = request.getfixturevalue("endpoint")
        variables = {"ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "s3cret-bearer"}
        return Subject(GithubOidcBroker(variables), name)
    return Subject(MAKERS[name](tmp_path), name)


def test_its_name_is_that_of_the_variable(subject: Subject) -> None:
    assert subject.broker.name == subject.name


@pytest.mark.parametrize("key", VALUES)
def test_values_are_exact(subject: Subject, key: str) -> None:
    assert subject.broker.resolve(key, cell_id=CELL) == VALUES[key]


def test_a_secret_can_be_had_again_and_for_another_cell(subject: Subject) -> None:
    assert {subject.broker.resolve("plain", cell_id=cell) for cell in (CELL, CELL, "cell-2")} == {VALUES["plain"]}


def test_an_unknown_key_is_an_error_that_names_it(subject: Subject) -> None:
    text = subject.refusal("no-such-key")
    assert text.startswith("secret broker: ")
    if subject.name == "github-oidc":  # who does not know the audience is the server, in its own words
        assert text == 'secret broker: oidc token request returned 404: {"message": "no such audience"}'
    else:
        assert '"no-such-key"' in text


@pytest.mark.parametrize("key", ["no-such-key", "", "nul\0", "equals=sign", "../plain", "plain\n", "s3cret"])
def test_no_error_holds_a_value(subject: Subject, key: str) -> None:
    text = subject.refusal(key)
    assert not [value for value in [*VALUES.values(), "s3cret-bearer"] if value and value in text]


def test_an_empty_key_is_an_error(subject: Subject) -> None:
    expected = "empty secret key" if subject.name == "memory" else "secret key must not be empty"
    assert subject.refusal("") == f"secret broker: {expected}"


@pytest.mark.parametrize("key", ["plain\0", "\0", "pl\0ain"])
def test_a_key_with_nul_is_an_error(subject: Subject, key: str) -> None:
    assert subject.refusal(key).startswith("secret broker: ")


@pytest.mark.parametrize("key", ["=", "plain=", "plain=s3cret"])
def test_a_key_with_an_equals_sign_is_another_key(subject: Subject, key: str) -> None:
    assert subject.refusal(key).startswith("secret broker: ")


def test_what_it_shows_of_itself_holds_no_value(subject: Subject) -> None:
    subject.broker.resolve("plain", cell_id=CELL)
    shown = f"{subject.broker!r} {subject.broker} {[subject.broker]}"
    assert not [value for value in [*VALUES.values(), "s3cret-bearer"] if value and value in shown]


def test_it_leaves_no_descriptor_open(subject: Subject) -> None:
    subject.broker.resolve("plain", cell_id=CELL)
    before = set(os.listdir("/proc/self/fd"))
    subject.broker.resolve("plain", cell_id=CELL)
    subject.refusal("no-such-key")
    if subject.name != "github-oidc":  # the server's own end of a connection is in this process too
        assert set(os.listdir("/proc/self/fd")) == before
