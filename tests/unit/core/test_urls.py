from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.core.urls import redact_known, redact_url, without_credentials


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://user:pw@host/path?q=1#f", "https://host/path?q=1#f"),
        ("https://user@host", "https://host"),
        ("nats://token@host:4222", "nats://host:4222"),
        ("nats://user:pw@[::1]:4222/x", "nats://[::1]:4222/x"),
        ("https://us%40er:p%2Fw@host/", "https://host/"),
        ("https://user:p@w@host/", "https://host/"),
        ("https://host:8443/path?q=1", "https://host:8443/path?q=1"),
        ("https://host/@scope/name", "https://host/@scope/name"),
        ("file:///etc/hosts", "file:///etc/hosts"),
        ("mailto:user@host", "mailto:user@host"),
        ("no url at all", "no url at all"),
        ("connect nats://user:pw@host:1/extra: refused", "connect nats://<redacted>host:1/extra: refused"),
        ("https://user:p/w@host/x", "https://<redacted>host/x"),
        ('a "https://u:p<"@h", b https://h/@x', 'a "https://<redacted>h", b https://h/@x'),
        ("first http://a/\nmail to me@home", "first http://a/\nmail to me@home"),
        ("", ""),
    ],
)
def test_user_and_password_of_a_url_are_not_shown(url: str, shown: str) -> None:
    assert redact_url(url) == shown
    assert redact_url(shown) == shown


@pytest.mark.parametrize(
    ("url", "bare"),
    [
        ("https://user:pw@host:8443/path?X-Amz-Signature=1#f", "https://host:8443/path"),
        ("https://host", "https://host"),
        ("https://host/@scope/x?y", "https://host/@scope/x"),
        ("https://u:p/w@host/x?y", "https://<redacted>host/x"),
        ("//user:pw@host?x", "//user:pw@host"),
        ("host/x?secret", "host/x"),
    ],
)
def test_a_bare_url_has_no_credentials(url: str, bare: str) -> None:
    assert without_credentials(url) == bare


words = st.text("abcXYZ019._~-%", min_size=1, max_size=9)


@given(st.sampled_from(["http", "https", "nats", "s3"]), words, words, st.sampled_from(["host", "h.example", "[::1]", "1.2.3.4"]), words)
def test_no_password_survives(scheme: str, user: str, password: str, host: str, query: str) -> None:
    user, password, query = f"<{user}>", f"({password})", f"?{query}!"
    url = f"{scheme}://{user}:{password}@{host}/path{query}"
    for shown in (redact_url(url), redact_url(f"cannot connect to {url}"), without_credentials(url)):
        assert password not in shown
        assert host in shown
    assert query not in without_credentials(url)


@given(st.text())
def test_any_text_can_be_redacted_twice(text: str) -> None:
    once = redact_url(text)
    assert redact_url(once) == once
    without_credentials(text)


def test_known_secrets_are_replaced() -> None:
    url = "https://u:p@host/x?sig=abc"
    text = f"PUT {url} with abc: {url}!"
    assert redact_known(text, [url, "abc", ""]) == "PUT https://host/x with <redacted>: https://host/x!"
    assert redact_known("nothing to see", [url]) == "nothing to see"
