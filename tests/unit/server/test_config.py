from __future__ import annotations

import pytest

from cellos.errors import ConfigError
from cellos.server.config import Address, read_config

TOKEN = {"CELLOS_SERVER_API_TOKEN": "t"}


def test_defaults() -> None:
    config = read_config(TOKEN)
    assert (config.bind, config.admin, config.skip_replay, config.state_dir) == (Address("127.0.0.1", 8080), None, False, None)


@pytest.mark.parametrize("text", ["1", "true", "TRUE", "True"])
def test_words_that_skip_the_replay(text: str) -> None:
    assert read_config({**TOKEN, "CELLOS_SERVER_SKIP_REPLAY": text}).skip_replay


@pytest.mark.parametrize("text", ["", "0", "yes", "on", "false", " 1"])
def test_words_that_do_not(text: str) -> None:
    assert not read_config({**TOKEN, "CELLOS_SERVER_SKIP_REPLAY": text}).skip_replay


def test_the_token_is_used_as_it_stands() -> None:
    assert read_config({"CELLOS_SERVER_API_TOKEN": " t "}).token == " t "


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0.0.0.0:0", Address("0.0.0.0", 0)),
        ("[::1]:65535", Address("::1", 65535)),
        ("::1:80", Address("::1", 80)),
        ("localhost:8080", Address("localhost", 8080)),
    ],
)
def test_addresses(text: str, address: Address) -> None:
    for variable in ("CELLOS_SERVER_BIND", "CELLOS_SERVER_ADMIN_BIND"):
        config = read_config({**TOKEN, variable: text})
        assert address in {config.bind, config.admin}


@pytest.mark.parametrize("text", ["", " ", ":80", "h:", "h:x", "h:-1", "h:65536", "h:٣", "h", "80", "h:111111111111111111111"])
@pytest.mark.parametrize("variable", ["CELLOS_SERVER_BIND", "CELLOS_SERVER_ADMIN_BIND"])
def test_what_is_no_address(variable: str, text: str) -> None:
    with pytest.raises(ConfigError, match=variable):
        read_config({**TOKEN, variable: text})


@pytest.mark.parametrize(
    ("environment", "text"),
    [
        ({}, "CELLOS_SERVER_API_TOKEN must be set (fail-closed)"),
        ({"CELLOS_SERVER_API_TOKEN": " "}, "CELLOS_SERVER_API_TOKEN must not be empty"),
        ({**TOKEN, "CELLOS_SERVER_READ_TOKEN": ""}, "CELLOS_SERVER_READ_TOKEN must not be empty; unset it if there is none"),
    ],
)
def test_tokens_fail_closed(environment: dict[str, str], text: str) -> None:
    with pytest.raises(ConfigError) as refused:
        read_config(environment)
    assert str(refused.value) == text


def test_nothing_secret_shows() -> None:
    config = read_config({"CELLOS_SERVER_API_TOKEN": "s3cr3t", "CELLOS_SERVER_READ_TOKEN": "als0"})
    assert not any(secret in repr(config) for secret in ("s3cr3t", "als0"))
