from __future__ import annotations

import pytest

from cellos.errors import ConfigError
from cellos.http.proxies import goes_direct, proxies


@pytest.mark.parametrize(
    ("listed", "host", "port", "direct"),
    [
        ("", "a.example", 80, False),
        ("*", "a.example", 80, True),
        ("example", "a.example", 80, True),
        ("a.example", "a.example", 80, True),
        ("a.example", "b.example", 80, False),
        ("a.example", "ba.example", 80, False),
        (".example", "a.example", 80, True),
        ("*.example", "a.example", 80, True),
        (" x , A.Example. ", "a.EXAMPLE", 80, True),
        ("a.example:8080", "a.example", 8080, True),
        ("a.example:8080", "a.example", 80, False),
        ("10.0.0.0/8", "10.1.2.3", 80, True),
        ("10.0.0.0/8", "11.1.2.3", 80, False),
        ("10.1.2.3", "10.1.2.3", 80, True),
        ("::1", "[::1]", 80, True),
        ("[::1]:81", "::1", 80, False),
        ("[::1]:81", "::1", 81, True),
        ("fd00::/8", "fd12::1", 80, True),
        ("10.0.0.0/99", "10.1.2.3", 80, False),
        (",,.", "a.example", 80, False),
    ],
)
def test_who_is_reached_without_a_proxy(listed: str, host: str, port: int, direct: bool) -> None:
    assert goes_direct({"NO_PROXY": listed}, host, port) is direct
    assert goes_direct({"no_proxy": listed}, host, port) is direct


def test_proxies_by_scheme() -> None:
    assert proxies({}) == {}
    assert proxies({"HTTP_PROXY": " proxy:3128 ", "https_proxy": "https://p", "HTTPS_PROXY": "no"}) == {
        "http": "http://proxy:3128",
        "https": "https://p",
    }
    assert proxies({"HTTP_PROXY": " ", "http_proxy": ""}) == {}


def test_what_is_no_proxy() -> None:
    with pytest.raises(ConfigError, match=r"^https_proxy: 'ftp://host' is not"):
        proxies({"https_proxy": "ftp://u:p@host"})
