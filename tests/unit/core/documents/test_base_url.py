import pytest

from cellos.core.documents.base_url import BaseUrl, BaseUrlError, parse_base_url

NOT_ABSOLUTE = "must be an absolute http(s) base URL without query or fragment"
OTHER_SCHEME = "must use http or https"


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("http://example.com", BaseUrl("http", "example.com", 80)),
        ("https://example.com/in/", BaseUrl("https", "example.com", 443)),
        ("HTTPS://API.Example.COM:8443/x", BaseUrl("https", "api.example.com", 8443)),
        ("https://example.com:", BaseUrl("https", "example.com", 443)),
        ("https://example.com:0", BaseUrl("https", "example.com", 0)),
        ("https://user:pass@example.com/", BaseUrl("https", "example.com", 443)),
        ("https://bücher.example/", BaseUrl("https", "xn--bcher-kva.example", 443)),
        ("http://10.1.2.3:81", BaseUrl("http", "10.1.2.3", 81)),
        ("http://[2001:DB8:0::1]:81/x", BaseUrl("http", "[2001:db8::1]", 81)),
        ("http://u@[::1]", BaseUrl("http", "[::1]", 80)),
        ("http://example.com./", BaseUrl("http", "example.com.", 80)),
        ("http://" + "a." * 126 + "a", BaseUrl("http", "a." * 126 + "a", 80)),
        ("http://localhost", BaseUrl("http", "localhost", 80)),
        ("http://under_score.example", BaseUrl("http", "under_score.example", 80)),
    ],
)
def test_scheme_host_and_port(text: str, url: BaseUrl) -> None:
    assert parse_base_url(text) == url


@pytest.mark.parametrize(
    "text",
    [
        "",
        "example.com/x",
        "//example.com",
        "/path",
        "http://",
        "http:///x",
        "http:example.com",
        "http:/example.com",
        "https://example.com/?q=1",
        "https://example.com/?",
        "https://example.com#",
        "https://example.com/#f",
        "https://example.com:65536",
        "https://example.com:x",
        "https://example.com:-1",
        "https://example.com:٨",
        "https://:443",
        "https://user@",
        "https://[::1",
        "https://::1]/",
        "https://[::1]x/",
        "https://[fe80::1%25eth0]/",
        "https://[example.com]/",
        "https://x[::1]/",
        "ftp://",
        "1http://example.com",
        # What browsers repair, and others repair differently.
        " https://example.com",
        "https://example.com/a b",
        "https://exam\nple.com",
        "https://example.com\\@evil.example",
        "https:\\\\example.com",
        "https://ex%61mple.com",
        "http://0x7f.1",
        "http://127.1",
        "http://010.0.0.1",
        "http://2130706433",
        "http://1.2.3.256",
        "http://fa\u00dfade.example",
        "http://a\u200db.example",
        "http://a^b.example",
        "http://" + "a." * 127,
        "http://" + "ü.b" * 100_000,
        "http://a|b.example",
    ],
)
def test_what_is_no_absolute_base_url(text: str) -> None:
    with pytest.raises(BaseUrlError) as caught:
        parse_base_url(text)
    assert str(caught.value) == NOT_ABSOLUTE


@pytest.mark.parametrize(
    "text", ["ftp://example.com", "file:///etc/passwd", "s3://bucket/key", "mailto:a@example.com", "ftp://example.com/?q", "x:"]
)
def test_another_scheme_is_told_before_all_else(text: str) -> None:
    with pytest.raises(BaseUrlError) as caught:
        parse_base_url(text)
    assert str(caught.value) == OTHER_SCHEME
