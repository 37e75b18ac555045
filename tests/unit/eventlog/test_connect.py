from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import pytest
from nats import errors as nats_errors

from cellos.errors import ConfigError
from cellos.eventlog.connect import (
    LONGEST_PAUSE_SECONDS,
    VARIABLES,
    LogClient,
    Settings,
    describe,
    login,
    pause,
    read_nats_settings,
    wants_tls,
)

SEED = "SUACSSL3UAHUDXKFSNVUZRF5UHPMWZ6BFDTJ7M6USDXIEDNPPQYYYCU3VY"
"""Of the documentation of NATS."""


def test_without_variables_it_is_the_server_of_this_machine() -> None:
    assert read_nats_settings({}) == Settings()
    assert read_nats_settings(dict.fromkeys((row.name for row in VARIABLES), " ")) == Settings()
    assert Settings().shown == "nats://127.0.0.1:4222"


def test_every_variable_has_an_effect(tmp_path: Path) -> None:
    (tmp_path / "seed").write_text(SEED)
    given = {
        "CELLOS_NATS_URL": "nats://h:1",
        "CELLOS_NATS_USER": "u",
        "CELLOS_NATS_PASSWORD": "p",
        "CELLOS_NATS_TOKEN": "t",
        "CELLOS_NATS_NKEY_SEED_FILE": str(tmp_path / "seed"),
    }
    both = {"CELLOS_NATS_USER", "CELLOS_NATS_PASSWORD"}
    for name, value in given.items():
        settings = read_nats_settings({each: given[each] for each in (both if name in both else {name})})
        assert settings != Settings()
        assert value in {getattr(settings, field) for field in settings.__struct_fields__}
    assert given.keys() | {"CELLOS_NATS_CA_FILE", "CELLOS_NATS_CREDS_FILE"} == {row.name for row in VARIABLES}


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        ({"CELLOS_NATS_URL": "http://u:s3cret@h"}, "CELLOS_NATS_URL: the scheme"),
        ({"CELLOS_NATS_URL": "nats://h:port"}, "CELLOS_NATS_URL: the port"),
        ({"CELLOS_NATS_USER": "u"}, "CELLOS_NATS_PASSWORD: is not set"),
        ({"CELLOS_NATS_PASSWORD": "s3cret"}, "CELLOS_NATS_USER: is not set"),
        (
            {"CELLOS_NATS_TOKEN": "s3cret", "CELLOS_NATS_USER": "u", "CELLOS_NATS_PASSWORD": "s3cret"},
            "CELLOS_NATS_USER and CELLOS_NATS_TOKEN",
        ),
        ({"CELLOS_NATS_URL": "nats://s3cret@h", "CELLOS_NATS_TOKEN": "s3cret"}, "CELLOS_NATS_URL and CELLOS_NATS_TOKEN: both"),
        ({"CELLOS_NATS_CA_FILE": "/no/such"}, "CELLOS_NATS_CA_FILE /no/such: No such file"),
        ({"CELLOS_NATS_NKEY_SEED_FILE": "/no/such"}, "CELLOS_NATS_NKEY_SEED_FILE /no/such: No such file"),
        ({"CELLOS_NATS_CREDS_FILE": "/no/such"}, "CELLOS_NATS_CREDS_FILE /no/such: No such file"),
        ({"CELLOS_NATS_CA_FILE": "/dev/null"}, "CELLOS_NATS_CA_FILE /dev/null: "),
        ({"CELLOS_NATS_CREDS_FILE": "/dev/null"}, "holds no user JWT"),
        ({"CELLOS_NATS_NKEY_SEED_FILE": "/dev/null"}, "is no NKey seed"),
    ],
)
def test_what_cannot_be_used_is_named_without_its_secret(environment: dict[str, str], said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        read_nats_settings(environment)
    assert said in str(raised.value)
    assert "s3cret" not in str(raised.value)


def test_a_representation_holds_no_credentials() -> None:
    settings = Settings(url="nats://u:s3cret@h:1,tls://t0ken@[::1]", password="s3cret", token="t0ken")
    assert repr(settings) == "Settings(nats://h:1,tls://[::1]:4222)"
    assert "s3cret" not in repr(LogClient(settings)) + repr(settings.servers)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, {}),
        ({"url": "nats://u:p%40@h"}, {"user": "u", "pass": "p@"}),
        ({"url": "nats://t@h"}, {"auth_token": "t"}),
        ({"user": "u", "password": "p"}, {"user": "u", "pass": "p"}),
        ({"token": "t"}, {"auth_token": "t"}),
    ],
)
def test_what_is_said_at_the_door(settings: dict[str, str], expected: dict[str, str]) -> None:
    found = Settings(**settings)
    assert login(found, found.servers[0], "") == expected


def test_servers_that_a_url_names_keep_their_own_credentials() -> None:
    settings = Settings(url="nats://a:1@one,nats://b:2@two")
    assert [login(settings, server, "")["user"] for server in settings.servers] == ["a", "b"]


def test_a_seed_signs_what_it_is_asked_to(tmp_path: Path) -> None:
    path = tmp_path / "seed"
    path.write_text(SEED)
    settings = Settings(nkey_seed_file=str(path))
    one, other = (login(settings, settings.servers[0], nonce) for nonce in ("a", "b"))
    assert one["nkey"] == other["nkey"] == "UDXU4RCSJNZOIQHZNWXHXORDPRTGNJAHAHFRGZNEEJCPQTT2M7NLCNF4"
    assert one["sig"] != other["sig"]


@pytest.mark.parametrize(
    ("url", "ca_file", "expected"),
    [("nats://h", None, False), ("tls://h", None, True), ("nats://h", "ca.pem", True)],
)
def test_when_nothing_may_go_in_the_clear(url: str, ca_file: str | None, expected: bool) -> None:
    settings = Settings(url=url, ca_file=ca_file)
    assert wants_tls(settings, settings.servers[0]) is expected


def test_pauses_grow_to_a_bound_and_are_spread() -> None:
    assert all(pause(attempt) <= LONGEST_PAUSE_SECONDS for attempt in (*range(1, 20), 10**6))
    assert max(pause(1) for _ in range(50)) < min(pause(10) for _ in range(50))
    assert len({pause(5) for _ in range(20)}) > 1


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 1)"), "connection refused"),
        (TimeoutError(), "no answer in time"),
        (OSError(113, "No route to host"), "No route to host (os error 113)"),
        (nats_errors.Error("nats: 'Authorization Violation'"), "'Authorization Violation'"),
        (ValueError(), "ValueError"),
    ],
)
def test_failures_in_words(error: Exception, expected: str) -> None:
    assert describe(error) == expected


def test_a_certificate_that_is_not_accepted() -> None:
    error: Any = ssl.SSLCertVerificationError(1, "certificate verify failed")
    error.verify_message = "self-signed certificate"
    assert describe(error) == "the certificate is not accepted: self-signed certificate"
