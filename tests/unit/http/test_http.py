from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx2
import pytest

from cellos import http
from cellos.errors import ConfigError


class Echo(BaseHTTPRequestHandler):
    """Answers with the request line; as a proxy, too."""

    def do_GET(self) -> None:
        body = f"{self.requestline} auth={self.headers['Proxy-Authorization']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_PUT(self) -> None:
        self.send_response(407)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # name of the library
        pass


@pytest.fixture
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Echo) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"127.0.0.1:{running.server_port}"
        running.shutdown()
        thread.join()


def client(**environment: str) -> httpx2.Client:
    return http.client(environment, timeout_ms=5000, connect_timeout_ms=5000)


class TestTimeouts:
    def test_defaults(self) -> None:
        assert http.timeouts({}, "X") == (30_000, 10_000)
        assert http.timeouts({}, "X", timeout_ms=15_000) == (15_000, 10_000)

    def test_values(self) -> None:
        assert http.timeouts({"X_TIMEOUT_MS": "250", "X_CONNECT_TIMEOUT_MS": " 50 "}, "X") == (250, 50)
        assert http.timeouts({"X_TIMEOUT_MS": str(2**64 - 1)}, "X")[0] == 2**64 - 1

    @pytest.mark.parametrize("value", ["", " ", "0", "-1", "1.5", "ten", "1_000", "\u0661", str(2**64), "9" * 5000])
    def test_what_is_no_positive_integer_of_64_bits_is_the_default(self, value: str) -> None:
        assert http.timeouts({"X_TIMEOUT_MS": value, "X_CONNECT_TIMEOUT_MS": value}, "X") == (30_000, 10_000)

    def test_the_longest_is_a_client_too(self, server: str) -> None:
        with http.client({}, timeout_ms=2**64 - 1, connect_timeout_ms=2**64 - 1) as asking:
            assert asking.get(f"http://{server}/a").status_code == 200


class TestTrust:
    def test_a_bundle_that_is_not_there(self, tmp_path: Path) -> None:
        path = tmp_path / "none.pem"
        with pytest.raises(ConfigError) as caught:
            client(CELLOS_CA_BUNDLE=str(path))
        assert str(caught.value) == f"CELLOS_CA_BUNDLE: read {path}: No such file or directory (os error 2)"

    @pytest.mark.parametrize("text", ["", "no certificate", "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"])
    def test_a_bundle_without_certificates(self, tmp_path: Path, text: str) -> None:
        path = tmp_path / "bundle.pem"
        path.write_text(text)
        with pytest.raises(ConfigError) as caught:
            client(CELLOS_CA_BUNDLE=str(path))
        assert str(caught.value) == f"CELLOS_CA_BUNDLE: no certificates found in {path}"

    @pytest.mark.parametrize("inside", ["\nAAAA\n-----END CERTIFICATE-----\n", "\n!\u00fc!\n-----END CERTIFICATE-----\n", "\nAAAA\n"])
    def test_a_bundle_that_is_broken(self, tmp_path: Path, inside: str) -> None:
        path = tmp_path / "bundle.pem"
        path.write_text("-----BEGIN CERTIFICATE-----" + inside)
        with pytest.raises(ConfigError, match=rf"^CELLOS_CA_BUNDLE: parse cert in {path}: "):
            client(CELLOS_CA_BUNDLE=str(path))

    def test_a_bundle_adds_to_the_store_of_the_system(self, tmp_path: Path) -> None:
        from datetime import UTC, datetime, timedelta

        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec

        pems = []
        for name in ("one", "two"):
            key = ec.generate_private_key(ec.SECP256R1())
            subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
            now = datetime.now(UTC)
            made = x509.CertificateBuilder(subject, subject, key.public_key(), 1, now, now + timedelta(1))
            made = made.add_extension(x509.BasicConstraints(True, None), critical=True)
            pems.append(made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        path = tmp_path / "bundle.pem"
        path.write_bytes(b"# gr\xfc\xdfe\n" + b"between\n".join(pems))
        before, after = (http.trust({"CELLOS_CA_BUNDLE": value}).cert_store_stats()["x509_ca"] for value in ("", str(path)))
        assert after == before + 2

    def test_old_protocols_are_refused(self) -> None:
        context = http.trust({})
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.check_hostname
        assert context.verify_mode == ssl.CERT_REQUIRED


class TestProxies:
    def test_only_the_given_environment_counts(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, "http://127.0.0.1:1")
        with client() as asking:
            assert asking.get(f"http://{server}/a").text.startswith("GET /a ")

    @pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy"])
    def test_a_request_goes_through_the_proxy(self, server: str, variable: str) -> None:
        with client(**{variable: f"http://us%40er:p%3Aw@{server}/"}) as asking:
            said = asking.get("http://nowhere.invalid/x").text
        assert said == "GET http://nowhere.invalid/x HTTP/1.1 auth=Basic dXNAZXI6cDp3"

    def test_small_letters_go_first(self, server: str) -> None:
        with client(http_proxy=server, HTTP_PROXY="http://127.0.0.1:1") as asking:
            assert asking.get("http://nowhere.invalid/x").status_code == 200

    def test_no_proxy_is_obeyed(self, server: str) -> None:
        with client(HTTP_PROXY="http://127.0.0.1:1", NO_PROXY="example.org, 127.0.0.0/8") as asking:
            assert asking.get(f"http://{server}/a").text.startswith("GET /a ")
            with pytest.raises(httpx2.ConnectError):
                asking.get("http://nowhere.invalid/x")

    def test_https_asks_the_proxy_to_connect(self, server: str) -> None:
        with client(HTTPS_PROXY=server) as asking, pytest.raises(httpx2.ProxyError, match="501"):
            asking.get("https://nowhere.invalid/x")

    def test_a_failure_names_the_proxy_without_its_password(self, server: str) -> None:
        refused = f"http://user:hidden@{server}"
        nobody = "http://user:hidden@127.0.0.1:1"
        with client(HTTPS_PROXY=refused, HTTP_PROXY=nobody) as asking:
            for url, proxy, why in (
                ("https://nowhere.invalid/x", server, "501"),
                ("http://nowhere.invalid/x", "127.0.0.1:1", "Connection refused"),
            ):
                with pytest.raises(httpx2.TransportError) as caught:
                    asking.get(url)
                text = http.fault_text(caught.value)
                assert text.startswith(why)
                assert text.endswith(f" (through the proxy http://{proxy})")
                assert "hidden" not in text

    def test_what_a_proxy_asks_for_itself_is_no_answer_of_the_server(self, server: str) -> None:
        with client(HTTP_PROXY=server) as asking, pytest.raises(httpx2.ProxyError) as caught:
            asking.put("http://nowhere.invalid/x")
        assert http.fault_text(caught.value) == f"407 Proxy Authentication Required (through the proxy http://{server})"
        with client() as asking:
            assert asking.put(f"http://{server}/x").status_code == 407

    @pytest.mark.parametrize("url", ["socks5://user:hidden@host:1080", "http://user:hidden@", "http://user:hidden@host:99999"])
    def test_a_proxy_that_cannot_be_used(self, url: str) -> None:
        with pytest.raises(ConfigError, match=r"^HTTPS_PROXY: .* is not the URL of an HTTP proxy; give http://host:port$") as caught:
            client(HTTPS_PROXY=url)
        assert "hidden" not in str(caught.value)


class TestRequests:
    def test_a_body_is_read_as_far_as_it_is_wanted(self, server: str) -> None:
        with client() as asking:
            for most, read in ((3, b"GET"), (1000, b"GET /a HTTP/1.1 auth=None")):
                with asking.stream("GET", f"http://{server}/a") as answer:
                    assert http.read_body(answer, most) == read

    def test_why_it_failed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        resolve = socket.getaddrinfo

        def resolver(host: str, *rest: Any, **more: Any) -> Any:
            if host.endswith(".invalid"):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return resolve(host, *rest, **more)

        monkeypatch.setattr(socket, "getaddrinfo", resolver)
        with socket.socket() as closed, client() as asking:
            closed.bind(("127.0.0.1", 0))
            url = f"http://127.0.0.1:{closed.getsockname()[1]}/?secret"
            for bad, text in (
                (url, "Connection refused (os error 111)"),
                ("http://nowhere.invalid/", "Name or service not known"),
                ("ftp://host/", "Request URL has an unsupported protocol 'ftp://'."),
            ):
                with pytest.raises(httpx2.HTTPError) as caught:
                    asking.get(bad)
                assert http.fault_text(caught.value) == text

    def test_a_name_with_a_dead_and_a_living_address(self, server: str, monkeypatch: pytest.MonkeyPatch) -> None:
        address, port = server.split(":")
        dead = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, int(port))) for each in ("127.0.0.9", address)]
        monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: dead)
        monkeypatch.setattr(socket, "create_connection", connect_to(address))
        with client() as asking:
            assert asking.get(f"http://two.example:{port}/a").status_code == 200


def connect_to(living: str) -> Any:
    def connect(address: tuple[str, int], timeout: float, **_: Any) -> socket.socket:
        if address[0] != living:
            raise ConnectionRefusedError(111, "Connection refused")
        found = socket.socket()
        found.settimeout(timeout)
        found.connect(address)
        return found

    return connect
