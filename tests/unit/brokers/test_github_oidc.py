from __future__ import annotations

from urllib.parse import parse_qs, urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.brokers.github_oidc import MAX_BODY_BYTES, SHOWN_BYTES, GithubOidcBroker, excerpt, with_audience
from cellos.errors import SecretBrokerError

JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJyZXBvIn0.c2lnbmF0dXJl"
SETTINGS = {"ACTIONS_ID_TOKEN_REQUEST_URL": "http://127.0.0.1:1/", "ACTIONS_ID_TOKEN_REQUEST_TOKEN": "s3cret-bearer"}


def refusal(key: str = "audience", **change: str | None) -> str:
    settings = {name: value for name, value in (SETTINGS | change).items() if value is not None}
    with pytest.raises(SecretBrokerError) as caught:
        GithubOidcBroker(settings).resolve(key, cell_id="c")
    assert "s3cret" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_an_address(value: str | None) -> None:
    expected = "ACTIONS_ID_TOKEN_REQUEST_URL not set — is this a GitHub Actions environment with `permissions: id-token: write`?"
    assert refusal(ACTIONS_ID_TOKEN_REQUEST_URL=value, ACTIONS_ID_TOKEN_REQUEST_TOKEN=None) == f"secret broker: {expected}"


@pytest.mark.parametrize("value", [None, "", "  "])
def test_without_a_token(value: str | None) -> None:
    assert refusal(ACTIONS_ID_TOKEN_REQUEST_TOKEN=value) == "secret broker: ACTIONS_ID_TOKEN_REQUEST_TOKEN not set"


@pytest.mark.parametrize("token", ["s3cret\nHost: elsewhere", "s3cret token", "s3crét", "s3cret\x7f"])
def test_a_token_that_no_header_can_carry_is_not_shown(token: str) -> None:
    expected = "secret broker: ACTIONS_ID_TOKEN_REQUEST_TOKEN holds characters that no header can carry"
    assert refusal(ACTIONS_ID_TOKEN_REQUEST_TOKEN=token) == expected


@pytest.mark.parametrize("url", ["ftp://h/?s3cret", "file:///etc/passwd", "h/s3cret"])
def test_an_address_of_another_kind_is_not_shown(url: str) -> None:
    expected = "secret broker: oidc token request: ACTIONS_ID_TOKEN_REQUEST_URL must be an http or https URL"
    assert refusal(ACTIONS_ID_TOKEN_REQUEST_URL=url) == expected


@pytest.mark.parametrize(
    "url", ["http://u:s3cret@h:99999999/", "http://[s3cret", "http://s3cret..h/", "http://\x01s3cret/", "http:///s3cret"]
)
def test_an_address_that_is_none_is_not_shown(url: str) -> None:
    assert refusal(ACTIONS_ID_TOKEN_REQUEST_URL=url).startswith("secret broker: oidc token request: ")


@pytest.mark.parametrize(
    ("url", "joined"),
    [
        ("http://h/t?api-version=2.0", "http://h/t?api-version=2.0&audience=a%2Fb"),
        ("http://h/t", "http://h/t?audience=a%2Fb"),
        ("http://h", "http://h?audience=a%2Fb"),
        ("http://h/t?", "http://h/t?audience=a%2Fb"),
        ("http://h/t?x=1&", "http://h/t?x=1&audience=a%2Fb"),
        ("http://h/t?x=1#part", "http://h/t?x=1&audience=a%2Fb"),
        ("http://h/t#part?x", "http://h/t?audience=a%2Fb"),
    ],
)
def test_the_audience_is_one_more_parameter(url: str, joined: str) -> None:
    assert with_audience(url, "a/b") == joined


def test_it_is_encoded_as_utf_8() -> None:
    assert with_audience("http://h", "é &=+#✓~") == "http://h?audience=%C3%A9%20%26%3D%2B%23%E2%9C%93~"


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), st.sampled_from(["http://h/t", "http://h/t?api-version=2.0"]))
def test_a_server_reads_the_audience_that_was_asked_for(audience: str, url: str) -> None:
    query = urlsplit(with_audience(url, audience)).query
    assert parse_qs(query, strict_parsing=True, keep_blank_values=True)["audience"] == [audience]


def test_a_key_that_is_no_text() -> None:
    assert refusal("a\ud800") == "secret broker: secret key is not valid Unicode text"


class TestExcerpt:
    def test_plain_words_are_kept(self) -> None:
        words = '{"message":"audience not allowed","id":"0d4a5b62-7b53-4b3a-9a53-93ff0a2a5e1c"}'
        assert excerpt(words.encode(), "s3cret") == words

    def test_it_is_short(self) -> None:
        assert excerpt(b"word " * 1000, "s3cret") == ("word " * 1000)[:SHOWN_BYTES]
        assert len(excerpt(b"\xff" * 1000, "s3cret").encode()) <= SHOWN_BYTES

    @pytest.mark.parametrize("body", [JWT, f'{{"value":"{JWT}"}}', f"bad token {JWT[:25]}", "ghs_" + "a1B2" * 9, "Bearer s3cret!"])
    def test_tokens_are_masked(self, body: str) -> None:
        shown = excerpt(body.encode(), "s3cret!")
        assert "[masked]" in shown
        assert not [part for part in ("eyJ", "a1B2", "s3cret") if part in shown]

    @given(st.text(max_size=600), st.integers(0, 700))
    def test_no_part_of_a_token_is_shown_wherever_the_cut_falls(self, around: str, spaces: int) -> None:
        shown = excerpt((" " * spaces + JWT + around).encode(), "s3cret")
        assert "eyJ" not in shown.replace(around, "")
        assert len(shown.encode()) <= SHOWN_BYTES

    def test_nothing_is_shown_of_what_was_cut(self) -> None:
        assert excerpt(b"s3cret " * MAX_BODY_BYTES, "s3cret") == "(more than 65536 bytes)"
