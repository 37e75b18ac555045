"""The github-oidc broker against a real HTTP server, which looks at what it was sent."""

from __future__ import annotations

import datetime as dt
import ipaddress
import json
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from cellos.brokers.github_oidc import MAX_BODY_BYTES, SHOWN_BYTES, GithubOidcBroker
from cellos.errors import SecretBrokerError

BEARER = "s3cret-bearer"
JWT = "eyJhbGciOiJSUzI1NiJ9.eyJzdWIiOiJyZXBvIn0.c2lnbmF0dXJl"
GOOD = json.dumps({"count": 1, "value": JWT}).encode()


class Endpoint(ThreadingHTTPServer):
    """Answers as it is told, and keeps what it was asked."""

    daemon_threads = False
    scheme = "http"

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = GOOD
        self.silent = threading.Event()
        """Set: requests are not answered until it is cleared and `go` is set."""
        self.go = threading.Event()
        self.asked: list[tuple[str, dict[str, str]]] = []

    def broker(self, path: str = "/token?api-version=2.0", **variables: str) -> GithubOidcBroker:
        url = f"{self.scheme}://127.0.0.1:{self.server_address[1]}{path}"
        return GithubOidcBroker({"ACTIONS_ID_TOKEN_REQUEST_URL": url, "ACTIONS_ID_TOKEN_REQUEST_TOKEN": BEARER} | variables)

    def refusal(self, **variables: str) -> str:
        with pytest.raises(SecretBrokerError) as caught:
            self.broker(**variables).resolve("aud", cell_id="c")
        text = str(caught.value)
        assert BEARER not in text
        assert "eyJ" not in text
        return text

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away is what some tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_GET(self) -> None:
        self.server.asked.append((self.path, dict(self.headers)))
        if self.server.silent.is_set():
            self.server.go.wait(30)
        self.send_response(self.server.status)
        for name, value in ({"Content-Length": str(len(self.server.body))} | self.server.headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(self.server.body)

    def log_message(self, *words: object) -> None:
        return


def serve(server: Endpoint) -> Iterator[Endpoint]:
    with server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.go.set()
        server.shutdown()
        thread.join()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    yield from serve(Endpoint())


@pytest.mark.parametrize("path", ["/token?api-version=2.0", "/token"])
def test_a_plain_get_with_the_bearer_token(endpoint: Endpoint, path: str) -> None:
    assert endpoint.broker(path).resolve("https://sts.example.net/é?x=1&y", cell_id="c") == JWT
    [(asked, headers)] = endpoint.asked
    assert urlsplit(asked).path == "/token"
    assert parse_qs(urlsplit(asked).query, strict_parsing=True) == {
        **parse_qs(urlsplit(path).query),
        "audience": ["https://sts.example.net/é?x=1&y"],
    }
    assert headers["Authorization"] == f"Bearer {BEARER}"


def test_a_refusal_of_the_server(endpoint: Endpoint) -> None:
    endpoint.status, endpoint.body = 500, b"try again later"
    assert endpoint.refusal() == "secret broker: oidc token request returned 500: try again later"


def test_a_refusal_never_shows_much_nor_a_token(endpoint: Endpoint) -> None:
    endpoint.status, endpoint.body = 403, f"no audience for {BEARER} and {JWT} ".encode() + b"word " * 1000
    text = endpoint.refusal()
    assert text.startswith("secret broker: oidc token request returned 403: no audience for [masked] and [masked] word word")
    assert len(text.encode()) == len("secret broker: oidc token request returned 403: ") + SHOWN_BYTES


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_no_redirect_is_followed(endpoint: Endpoint, status: int) -> None:
    endpoint.status, endpoint.body, endpoint.headers = status, b"moved", {"Location": "/elsewhere"}
    assert endpoint.refusal() == f"secret broker: oidc token request returned {status}: moved"
    assert len(endpoint.asked) == 1


@pytest.mark.parametrize("status", [201, 204])
def test_another_success_is_no_token(endpoint: Endpoint, status: int) -> None:
    endpoint.status, endpoint.body = status, b""
    assert endpoint.refusal() == f"secret broker: oidc token request returned {status}: "


@pytest.mark.parametrize(
    ("body", "why"),
    [
        (b"", "the answer is not JSON"),
        (JWT.encode(), "the answer is not JSON"),
        (b'{"value":"\xff"}', "the answer is not JSON"),
        (b"[" * 60_000, "the answer is not JSON"),
        (f'"{JWT}"'.encode(), 'the answer has no text "value"'),
        (b"{}", 'the answer has no text "value"'),
        (b'{"value":null}', 'the answer has no text "value"'),
        (b'{"value":"\\ud800"}', 'the answer has no text "value"'),
        (b" " * (MAX_BODY_BYTES + 1), "the answer is larger than 65536 bytes"),
    ],
)
def test_an_answer_that_is_none(endpoint: Endpoint, body: bytes, why: str) -> None:
    endpoint.body = body
    assert endpoint.refusal() == f"secret broker: oidc token parse: {why}"


def test_an_endless_answer_is_left(endpoint: Endpoint) -> None:
    endpoint.body, endpoint.headers = b" " * (MAX_BODY_BYTES * 2), {"Content-Length": str(1 << 40)}
    assert endpoint.refusal() == "secret broker: oidc token parse: the answer is larger than 65536 bytes"


def test_a_server_that_says_nothing_is_left(endpoint: Endpoint) -> None:
    endpoint.silent.set()
    text = endpoint.refusal(CELLOS_BROKER_OIDC_TIMEOUT_MS="50")
    assert text.startswith("secret broker: oidc token request: ")
    assert "timed out" in text


@pytest.mark.parametrize("value", ["0", "-1", "soon", "", "1.5", "18446744073709551616"])
def test_a_time_out_that_is_none_is_the_default(endpoint: Endpoint, value: str) -> None:
    variables = {"CELLOS_BROKER_OIDC_TIMEOUT_MS": value, "CELLOS_BROKER_OIDC_CONNECT_TIMEOUT_MS": value}
    assert endpoint.broker(**variables).resolve("aud", cell_id="c") == JWT


@pytest.mark.parametrize("value", ["1000000", "18446744073709551615"])
def test_long_time_outs(endpoint: Endpoint, value: str) -> None:
    variables = {"CELLOS_BROKER_OIDC_TIMEOUT_MS": value, "CELLOS_BROKER_OIDC_CONNECT_TIMEOUT_MS": value}
    assert endpoint.broker(**variables).resolve("aud", cell_id="c") == JWT


def test_nobody_listens(endpoint: Endpoint) -> None:
    broker = endpoint.broker()
    endpoint.socket.close()
    with pytest.raises(SecretBrokerError) as caught:
        broker.resolve("aud", cell_id="c")
    assert str(caught.value) == "secret broker: oidc token request: Connection refused (os error 111)"


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate of 127.0.0.1 that is its own authority, with its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test")])
    now = dt.datetime.now(dt.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    place = tmp_path_factory.mktemp("tls")
    (place / "certificate.pem").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    (place / "key.pem").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return place


class TestTls:
    @pytest.fixture
    def endpoint(self, authority: Path) -> Iterator[Endpoint]:
        server = Endpoint()
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(authority / "certificate.pem", authority / "key.pem")
        server.socket = context.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        server.scheme = "https"
        yield from serve(server)

    def test_whom_the_bundle_names_is_believed(self, endpoint: Endpoint, authority: Path) -> None:
        broker = endpoint.broker(CELLOS_CA_BUNDLE=str(authority / "certificate.pem"))
        assert broker.resolve("aud", cell_id="c") == JWT

    def test_others_get_no_token(self, endpoint: Endpoint) -> None:
        assert "certificate" in endpoint.refusal()
        assert endpoint.asked == []

    def test_a_bundle_that_cannot_be_read(self, endpoint: Endpoint, tmp_path: Path) -> None:
        text = endpoint.refusal(CELLOS_CA_BUNDLE=str(tmp_path / "none.pem"))
        expected = f"CELLOS_CA_BUNDLE: read {tmp_path / 'none.pem'}: No such file or directory (os error 2)"
        assert text == f"secret broker: oidc token request: {expected}"
