from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import Any

import pytest

from cellos.cli import up
from cellos.cli.parts import last_words
from cellos.cli.up import Files, block, environment, joined, listener_at, status, url_of
from cellos.client.address import Address
from cellos.errors import ConfigError


class Nats:
    """What is asked of an EmbeddedNats here."""

    url_with_credentials = "nats://cellos:hidden@127.0.0.1:4711"
    max_stream_bytes = 1 << 30


class TestListener:
    def test_the_usual_port_or_another_where_it_is_taken(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            monkeypatch.setattr(up, "PORT", taken.getsockname()[1])
            with listener_at(None) as other:
                host, port = other.getsockname()
                assert (host, port > 0, port != up.PORT) == ("127.0.0.1", True, True)
        with listener_at(None) as usual:
            assert usual.getsockname() == ("127.0.0.1", up.PORT)

    def test_one_that_is_given(self) -> None:
        with listener_at("localhost:0") as first:
            port = first.getsockname()[1]
        with listener_at(f"127.0.0.1:{port}") as second:
            assert url_of(second) == f"http://127.0.0.1:{port}"

    def test_a_given_one_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as taken:
            bind = f"127.0.0.1:{taken.getsockname()[1]}"
            with pytest.raises(ConfigError, match=rf"--bind {bind}: Address already in use .*; 127.0.0.1:0 takes a free port"):
                listener_at(bind)

    def test_all_addresses_are_called_by_one(self) -> None:
        with listener_at("0.0.0.0:0") as listener:
            assert url_of(listener) == f"http://127.0.0.1:{listener.getsockname()[1]}"

    @pytest.mark.parametrize("bind", ["", "8080", ":8080", "h:", "h:x", "h:65536", "h:-1", "[]:1"])
    def test_no_address(self, bind: str) -> None:
        with pytest.raises(ConfigError, match=r"not HOST:PORT, for example 127.0.0.1:8080"):
            listener_at(bind)

    def test_as_it_stands_in_a_url(self) -> None:
        assert (joined("127.0.0.1", 1), joined("::1", 1)) == ("127.0.0.1:1", "[::1]:1")


class TestEnvironment:
    def test_what_the_server_is_told(self) -> None:
        ours = {
            "PATH": "/bin",
            "CELLOS_NATS_USER": "x",
            "CELLOS_NATS_CREDS_FILE": "y",
            "CELLOS_SERVER_READ_TOKEN": "r",
            "CELLOS_SERVER_BIND": "z",
        }
        nats: Any = Nats()
        assert environment(ours, Files("/s/up"), nats, token="t") == {
            "PATH": "/bin",
            "CELLOS_SERVER_READ_TOKEN": "r",
            "CELLOS_SERVER_API_TOKEN": "t",
            "CELLOS_SERVER_STATE_DIR": "/s/up/server",
            "CELLOS_NATS_URL": Nats.url_with_credentials,
            "CELLOS_NATS_STREAM_MAX_BYTES": str(1 << 30),
        }

    def test_the_size_of_the_log_may_be_chosen(self) -> None:
        nats: Any = Nats()
        ours = {"CELLOS_NATS_STREAM_MAX_BYTES": "5000000"}
        assert environment(ours, Files("/s/up"), nats, token="t")["CELLOS_NATS_STREAM_MAX_BYTES"] == "5000000"

    def test_the_status_holds_no_credentials(self) -> None:
        node = {"node": "here", "slots": 2, "classes": ["base", "limits"], "pid": 7}
        facts = status(Files("/s/up"), Address(url="http://h:1", token="hidden", given=False), "nats://127.0.0.1:4711", [node])
        assert "hidden" not in block(facts) + json.dumps(facts)
        for text in ("http://h:1", "/s/up/token", "/s/up/nats-url", "here, 2 cells at once (base, limits)", "cellos apply -f"):
            assert text in block(facts)
        assert "terminal:  CELLOS_STATE_DIR=/s cellos apply" in block(facts, prefix="CELLOS_STATE_DIR=/s ")

    def test_without_a_node(self) -> None:
        facts = status(Files("/s/up"), Address(url="http://h:1", token="hidden", given=False), "nats://127.0.0.1:4711", [])
        assert "node     none here" in block(facts)

    def test_one_cell(self) -> None:
        node = {"node": "here", "slots": 1, "classes": ["base"]}
        facts = status(Files("/s/up"), Address(url="http://h:1", token="hidden", given=False), "nats://127.0.0.1:4711", [node])
        assert "here, 1 cell at once (base)" in block(facts)


class TestToken:
    def test_it_is_made_once_and_nobody_else_can_read_it(self, tmp_path: Path) -> None:
        files = Files(str(tmp_path))
        token = up._token(files)
        assert (len(token), up._token(files)) == (43, token)
        os.chmod(files.token, 0o644)
        assert up._token(files) == token
        assert os.stat(files.token).st_mode & 0o777 == 0o600

    @pytest.mark.parametrize("text", ["", "\n", "é\n"])
    def test_one_that_is_damaged_is_not_made_anew_by_itself(self, tmp_path: Path, text: str) -> None:
        files = Files(str(tmp_path))
        Path(files.token).write_text(text)
        with pytest.raises(ConfigError, match=rf"^{files.token} holds no token; remove it and a new one is made$"):
            up._token(files)


class TestNatsPort:
    def test_the_latest_where_it_is_free(self, tmp_path: Path) -> None:
        files = Files(str(tmp_path))
        assert up._last_nats_port(files) == -1
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            up._write(files.nats_url, f"nats://u:p@127.0.0.1:{port}")
            assert up._last_nats_port(files) == -1
        assert up._last_nats_port(files) == port

    @pytest.mark.parametrize("text", ["", "nats://u:p@127.0.0.1", "nats://127.0.0.1:x"])
    def test_none_where_the_file_says_none(self, tmp_path: Path, text: str) -> None:
        files = Files(str(tmp_path))
        up._write(files.nats_url, text)
        assert up._last_nats_port(files) == -1


@pytest.mark.parametrize(
    ("log", "words"),
    [
        ('{"level":"ERROR","fields":{"message":"x fatal","error":"why"}}\n{"level":"INFO","fields":{"message":"bye"}}\n', "why"),
        ('{"level":"ERROR","fields":{"message":"x fatal"}}\nnot json\n[]\n', "x fatal"),
        ('{"level":"ERROR","fields":{"message":"old"}}\n{"level":"INFO","fields":{"message":"well"}}\n', ""),
        ('{"level":"INFO","fields":{"message":"well"}}\n{"level":"ERROR","fields":{"message":"m"}}\n', "m"),
        ('{"level":"INFO","fields":{}}\nImportError: x\n', "ImportError: x"),
        ("", ""),
        ("x" * 100_000 + "\nlast\n", "last"),
    ],
)
def test_the_last_words_of_a_server(tmp_path: Path, log: str, words: str) -> None:
    (tmp_path / "log").write_text(log)
    assert last_words(str(tmp_path / "log")) == words


def test_of_the_latest_start_only(tmp_path: Path) -> None:
    before = '{"level":"ERROR","fields":{"message":"x fatal"}}\n'
    (tmp_path / "log").write_text(f"{before}")
    assert not last_words(str(tmp_path / "log"), len(before))


def test_there_may_be_no_log(tmp_path: Path) -> None:
    assert not last_words(str(tmp_path / "none"))
