from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError
from cellos.eventlog.nats_url import Server, read_servers, shown_url


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("nats://127.0.0.1:4222", Server(host="127.0.0.1")),
        ("nats.example.org", Server(host="nats.example.org")),
        ("localhost:5222", Server(host="localhost", port=5222)),
        ("TLS://h:1", Server(host="h", port=1, tls=True)),
        ("nats://[::1]:4333", Server(host="::1", port=4333)),
        ("nats://[fe80::1%25eth0]", Server(host="fe80::1%25eth0")),
        ("nats://user:pass@h", Server(host="h", user="user", password="pass")),
        ("nats://user:@h", Server(host="h", user="user", password="")),
        ("nats://token@h", Server(host="h", token="token")),
        ("nats://u%40x:p%3A%2F%25@h/", Server(host="h", user="u@x", password="p:/%")),
        ("nats://user:p@ss@h:9", Server(host="h", port=9, user="user", password="p@ss")),
    ],
)
def test_one_server(url: str, expected: Server) -> None:
    [server] = read_servers(url)
    for name in ("host", "port", "tls", "user", "password", "token"):
        assert getattr(server, name) == getattr(expected, name), name


def test_several_servers_keep_their_order_and_their_credentials() -> None:
    first, second, third = read_servers("nats://a:1, tls://u:p@b:2 ,c")
    assert (first.shown, second.shown, third.shown) == ("nats://a:1", "tls://b:2", "nats://c:4222")
    assert (first.user, second.user, third.user) == (None, "u", None)


@pytest.mark.parametrize(
    "url",
    ["", " ", "a,,b", "http://h", "ws://s3cret@h", "nats://", "nats://u:s3cret@", "nats://u:s3cret@h:x", "h:0", "h:65536", "h:²", "::1",
     "[::1", "[::1]x", "nats://a b", "nats://u:s3cret@h\n:1", "nats://u:s3cret@[::1"],
)  # fmt: skip
def test_what_is_no_url_is_refused_without_its_credentials(url: str) -> None:
    with pytest.raises(ConfigError, match="NATS_URL") as caught:
        read_servers(url)
    assert "s3cret" not in str(caught.value)
    assert shown_url(url) == "(unreadable)"


@given(st.text(alphabet="abc:/@,.[]%0", max_size=30))
def test_any_text_is_servers_or_a_config_error(url: str) -> None:
    try:
        assert all(server.host and 0 < server.port < 65536 for server in read_servers(url))
    except ConfigError:
        pass


def test_nothing_that_is_printed_holds_credentials() -> None:
    [server] = read_servers("nats://user:s3cret@h")
    assert repr(server) == str(server) == "Server(nats://h:4222)"
    assert shown_url("nats://user:s3cret@h,tls://tok@[::1]") == "nats://h:4222,tls://[::1]:4222"
