"""What holds for every ArtifactStore, and what holds for those that speak HTTP.

The HTTP server records what it gets; S3 is moto's server in a process of its own, written to by URLs that botocore presigned.
"""

from __future__ import annotations

import errno
import hashlib
import io
import os
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from cellos.artifacts.files import DirectoryStore, PlacedFiles
from cellos.artifacts.http import HttpStore
from cellos.artifacts.s3 import S3Store
from cellos.artifacts.upload import LONGEST_PAUSE_SECONDS, MOST_OF_AN_ANSWER, Retries, Upload
from cellos.errors import ExportError
from cellos.ports import ArtifactStore

CELL, NAME = "cell-1", "report.bin"
MIB = 1 << 20
REFUSED = r"^export sink: "


class Answer:
    def __init__(self, status: int = 201, body: bytes = b"", **headers: str) -> None:
        self.status, self.body, self.headers = status, body, {name.replace("_", "-"): value for name, value in headers.items()}


class Recorder(ThreadingHTTPServer):
    """Keeps what was PUT under its path, and gives the answers that were asked for, then 201."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: list[Answer] = []
        self.requests: list[tuple[str, dict[str, str]]] = []
        self.kept: dict[str, bytes] = {}
        self.scheme = "http"

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Clients that go away are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Recorder

    def do_PUT(self) -> None:
        self.server.requests.append((self.path, dict(self.headers.items())))
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:
            self.close_connection = True
            return
        answer = self.server.answers.pop(0) if self.server.answers else Answer()
        if answer.status < 300:
            self.server.kept[self.path] = body
        self.send_response(answer.status)
        self.send_header("Content-Length", str(len(answer.body)))
        for name, value in answer.headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer.body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # name of the library
        pass


@pytest.fixture
def web() -> Iterator[Recorder]:
    yield from serve(Recorder())


def serve(server: Recorder) -> Iterator[Recorder]:
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def tls_web(tmp_path: Path) -> Iterator[tuple[Recorder, str]]:
    """A server with a certificate of an authority that nobody knows, and the path of that authority's certificate."""
    certificate, authority = certificates(tmp_path)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    server = Recorder()
    server.scheme = "https"
    server.socket = context.wrap_socket(server.socket, server_side=True)
    for started in serve(server):
        yield started, authority


def certificates(directory: Path) -> tuple[str, str]:
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    def name(text: str) -> x509.Name:
        return x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, text)])

    now = datetime.now(UTC)
    keys = [ec.generate_private_key(ec.SECP256R1()) for _ in range(2)]

    def issue(subject: str, key: ec.EllipticCurvePrivateKey, extension: x509.ExtensionType) -> x509.Certificate:
        builder = x509.CertificateBuilder().subject_name(name(subject)).issuer_name(name("authority")).public_key(key.public_key())
        builder = builder.serial_number(x509.random_serial_number()).not_valid_before(now - timedelta(days=1))
        builder = builder.not_valid_after(now + timedelta(days=1)).add_extension(extension, critical=True)
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        builder = builder.add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(keys[0].public_key()), critical=False)
        if subject == "authority":
            usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
            builder = builder.add_extension(usage, critical=True)
        return builder.sign(keys[0], hashes.SHA256())

    pem = serialization.Encoding.PEM
    authority = issue("authority", keys[0], x509.BasicConstraints(ca=True, path_length=0)).public_bytes(pem)
    server = issue("server", keys[1], x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))])).public_bytes(pem)
    key = keys[1].private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / "server.pem").write_bytes(server + key)
    (directory / "authority.pem").write_bytes(b"An authority of our own.\n" + authority)
    return str(directory / "server.pem"), str(directory / "authority.pem")


MOTO = """
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(port=0, verbose=False)
server.start()
print("http://%s:%d" % server.get_host_and_port(), flush=True)
input()
server.stop()
"""


@pytest.fixture(scope="module")
def s3() -> Iterator[Any]:
    """A client of an S3 API, whose bucket `archive` exists."""
    import boto3  # type: ignore[import-untyped]
    from botocore.config import Config  # type: ignore[import-untyped]

    with (
        pytest.MonkeyPatch.context() as patch,
        subprocess.Popen([sys.executable, "-c", MOTO], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process,
    ):
        for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            patch.delenv(variable, raising=False)
        assert process.stdin is not None
        assert process.stdout is not None
        endpoint = process.stdout.readline().strip()
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="eu-central-1",
            aws_access_key_id="AKIDEXAMPLE",
            aws_secret_access_key="not-a-secret",
            aws_session_token="a-session/token+of==botocore",
            config=Config(signature_version="s3v4"),
        )
        client.create_bucket(Bucket="archive", CreateBucketConfiguration={"LocationConstraint": "eu-central-1"})
        yield client
        client.close()
        process.stdin.write("\n")


def presigned(client: Any, key: str) -> str:
    url: str = client.generate_presigned_url("put_object", Params={"Bucket": "archive", "Key": key}, ExpiresIn=300)
    return url


class Place:
    """A store, and a look at what it holds under NAME."""

    def __init__(self, store: ArtifactStore, held: Callable[[], bytes | None], destination: str, secrets: tuple[str, ...] = ()) -> None:
        self.store, self.held, self.destination, self.secrets = store, held, destination, secrets


def held_file(path: Path) -> bytes | None:
    assert not path.parent.exists() or os.listdir(path.parent) in ([], [path.name])
    return path.read_bytes() if path.exists() else None


@pytest.fixture(params=["local", "placed", "http", "https", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    match request.param:
        case "local":
            path = tmp_path / f"root/{CELL}/{NAME}"
            yield Place(DirectoryStore(str(tmp_path / "root")), lambda: held_file(path), f"{CELL}/{NAME}")
        case "placed":
            path = tmp_path / "place/here"
            path.parent.mkdir()
            yield Place(PlacedFiles({NAME: str(path)}), lambda: held_file(path), str(path))
        case "http" | "https":
            server, authority = request.getfixturevalue("tls_web") if request.param == "https" else (request.getfixturevalue("web"), "")
            upload = Upload("http", {"CELLOS_CA_BUNDLE": authority})
            base = server.url.replace("://", "://user:letmein@") + "/in/"
            drop = HttpStore(base, upload, target="drop", token="a.bearer.token")
            at = f"/in/{CELL}/{NAME}"
            yield Place(drop, lambda: server.kept.get(at), server.url + at, ("user", "letmein", "a.bearer.token"))
            upload.close()
        case _:
            client = request.getfixturevalue("s3")
            key = f"2031/{hashlib.sha256(request.node.name.encode()).hexdigest()}/{NAME}"
            upload = Upload("s3", {})
            url = presigned(client, key)
            store = S3Store(url, upload, target="archive", bucket="archive", key_prefix="/2031/", region="eu-central-1")

            def held() -> bytes | None:
                try:
                    body: bytes = client.get_object(Bucket="archive", Key=key)["Body"].read()
                except client.exceptions.NoSuchKey:
                    return None
                return body

            yield Place(store, held, f"s3://archive/2031/{NAME}", (url.partition("?")[2],))
            upload.close()


class Small(io.FileIO):
    """A file that nobody reads in one piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        assert size is not None
        assert 0 < size <= MIB
        return super().read(size)


class Broken(io.BytesIO):
    """Fails after its first piece."""

    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell():
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return super().read(3)


@pytest.mark.parametrize("content", [b"", b"a line\n", os.urandom(2 * MIB + 7)], ids=["empty", "small", "pieces"])
def test_an_artifact_arrives_whole(place: Place, content: bytes) -> None:
    receipt = place.store.put(CELL, NAME, io.BytesIO(content), content_type="application/octet-stream")
    assert place.held() == content
    assert receipt.bytes_written == len(content)


def test_the_receipt_says_where_it_is(place: Place) -> None:
    receipt = place.store.put(CELL, NAME, io.BytesIO(b"x"))
    assert (receipt.target_kind, receipt.target_name) == (place.store.kind, place.store.target)
    assert receipt.destination == place.store.destination(CELL, NAME) == place.destination
    assert not [secret for secret in place.secrets if secret in receipt.destination]


def test_a_large_artifact_is_never_in_memory_as_a_whole(place: Place, tmp_path: Path) -> None:
    (tmp_path / "large").touch()
    os.truncate(tmp_path / "large", 50 * MIB)
    with Small(tmp_path / "large") as source:
        receipt = place.store.put(CELL, NAME, source)
    assert receipt.bytes_written == 50 * MIB
    assert hashlib.sha256(place.held() or b"").digest() == hashlib.sha256(bytes(50 * MIB)).digest()


def test_a_source_that_breaks_leaves_nothing(place: Place) -> None:
    with pytest.raises(ExportError, match=r"Input/output error \(os error 5\)$"):
        place.store.put(CELL, NAME, Broken(b"abcdef"))
    assert place.held() is None


@pytest.mark.parametrize("name", ["", "..", ".", "a\0b"])
def test_a_name_that_leads_elsewhere_is_refused(place: Place, name: str) -> None:
    with pytest.raises(ExportError, match=REFUSED):
        place.store.put(CELL, name, io.BytesIO(b"x"))
    assert place.held() is None


@pytest.mark.parametrize("place", ["local", "http", "s3"], indirect=True)
@pytest.mark.parametrize("cell_id", ["", "..", "a/b", "a\\b", "a\0b"])
def test_a_cell_id_that_leads_elsewhere_is_refused(place: Place, cell_id: str) -> None:
    with pytest.raises(ExportError, match="export cell_id must be a single path segment"):
        place.store.put(cell_id, NAME, io.BytesIO(b"x"))


# -- what speaks HTTP ---------------------------------------------------------------------------------------------------------------------


class Remote:
    """Makes stores of one kind for a server of ours; `pauses` is what they slept."""

    def __init__(self, kind: str, web: Recorder) -> None:
        self.kind, self.web, self.pauses = kind, web, [0.0][:0]
        self.uploads: list[Upload] = []
        self.path = f"/in/{CELL}/{NAME}"

    def store(
        self, url: str | None = None, *, token: str | None = None, attempts: int = 1, backoff_ms: int = 0, **variables: str
    ) -> ArtifactStore:
        retries = Retries(max_attempts=attempts, backoff_ms=backoff_ms)
        upload = Upload("http" if self.kind == "http" else "s3", variables, retries=retries, sleep=self.pauses.append)
        self.uploads.append(upload)
        if self.kind == "http":
            return HttpStore(url or f"{self.web.url}/in", upload, target="t", token=token)
        return S3Store(url or f"{self.web.url}/in/{{cell_id}}/{{artifact_name}}", upload, target="t", bucket="b")

    def put(self, content: bytes = b"content", **options: Any) -> None:
        self.store(**options).put(CELL, NAME, io.BytesIO(content))


@pytest.fixture(params=["http", "s3"])
def remote(request: pytest.FixtureRequest, web: Recorder) -> Iterator[Remote]:
    remote = Remote(request.param, web)
    yield remote
    for upload in remote.uploads:
        upload.close()


@pytest.mark.parametrize("status", [500, 502, 503, 504, 408, 425, 429])
def test_what_may_pass_is_tried_again_from_the_beginning(remote: Remote, status: int) -> None:
    remote.web.answers = [Answer(status), Answer(status)]
    remote.put(attempts=3, backoff_ms=250)
    assert remote.web.kept == {remote.path: b"content"}
    assert remote.pauses == [0.25, 0.25]


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 413])
def test_what_will_not_pass_is_not_tried_again(remote: Remote, status: int) -> None:
    remote.web.answers = [Answer(status, b"no")]
    with pytest.raises(ExportError, match=rf"^export sink: {remote.kind} put {remote.web.url}{remote.path} returned {status}: no$"):
        remote.put(attempts=3)
    assert (len(remote.web.requests), remote.web.kept) == (1, {})


def test_the_last_attempt_is_the_last(remote: Remote) -> None:
    remote.web.answers = [Answer(503, b"busy") for _ in range(5)]
    with pytest.raises(ExportError, match=r" returned 503: busy$"):
        remote.put(attempts=2)
    assert (len(remote.web.requests), remote.pauses) == (2, [0.0])


def test_one_attempt_is_what_nobody_asked_to_change(remote: Remote) -> None:
    remote.web.answers = [Answer(503)]
    with pytest.raises(ExportError, match=r" returned 503: $"):
        remote.put()
    assert len(remote.web.requests) == 1


@pytest.mark.parametrize(
    ("asked", "slept"), [("2", 2.0), ("0", 0.5), ("86400", LONGEST_PAUSE_SECONDS), ("-1", 0.5), ("Fri, 31 Dec 2027 23:59:59 GMT", 0.5)]
)
def test_a_server_may_ask_for_time(remote: Remote, asked: str, slept: float) -> None:
    remote.web.answers = [Answer(429, Retry_After=asked)]
    remote.put(attempts=2, backoff_ms=500)
    assert remote.pauses == [slept]


def test_a_redirect_is_not_followed(remote: Remote) -> None:
    remote.web.answers = [Answer(307, Location=f"{remote.web.url}/elsewhere")]
    with pytest.raises(ExportError, match=" returned 307: "):
        remote.put(attempts=2)
    assert (len(remote.web.requests), remote.web.kept) == (1, {})


def test_a_refused_connection(remote: Remote) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/a"
        with pytest.raises(ExportError, match=rf"^export sink: {remote.kind} put {url}.*: Connection refused \(os error 111\)$"):
            remote.put(url=url, attempts=3, backoff_ms=10)
    assert remote.pauses == [0.01, 0.01]


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nX: "], ids=["nothing", "byte by byte"])
def test_a_server_that_does_not_answer_holds_nobody_up(remote: Remote, said: bytes) -> None:
    stop = threading.Event()

    def dawdle() -> None:
        while not stop.is_set():
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection:
                try:
                    connection.sendall(said)
                    while not stop.wait(0.02):
                        connection.sendall(b"x" if said else b"")
                        if time.monotonic() - began > 60:
                            return
                except OSError:
                    pass

    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        thread = threading.Thread(target=dawdle)
        thread.start()
        began = time.monotonic()
        limit: dict[str, Any] = {f"CELLOS_EXPORT_{remote.kind.upper()}_TIMEOUT_MS": "150"}
        with pytest.raises(ExportError, match=r": timed out$"):
            remote.put(url=f"http://127.0.0.1:{server.getsockname()[1]}/a", **limit)
        took = time.monotonic() - began
        stop.set()
        thread.join()
    assert took < 30


def test_what_is_sent(remote: Remote) -> None:
    remote.store().put(CELL, NAME, io.BytesIO(b"content"), content_type="text/csv; charset=utf-8")
    [(path, headers)] = remote.web.requests
    assert path == remote.path
    assert (headers["Content-Type"], headers["Content-Length"]) == ("text/csv; charset=utf-8", "7")
    assert not headers.keys() & {"Authorization", "Transfer-Encoding", "Cookie"}


def test_without_a_content_type_none_is_sent(remote: Remote) -> None:
    remote.put()
    [(_, headers)] = remote.web.requests
    assert "Content-Type" not in headers


@pytest.mark.parametrize("content_type", ["", "text/plain\r\nX-Amz-Acl: public-read", "tëxt/plain"])
def test_a_content_type_that_is_no_header(remote: Remote, content_type: str) -> None:
    with pytest.raises(ExportError, match=f'artifact "{NAME}": its contentType is not printable ASCII'):
        remote.store().put(CELL, NAME, io.BytesIO(b"x"), content_type=content_type)
    assert remote.web.requests == []


def test_a_token_goes_before_a_password_in_the_url(web: Recorder) -> None:
    remote = Remote("http", web)
    base = web.url.replace("://", "://user:letmein@")
    remote.put(url=base, token="t0ken")
    remote.put(url=base)
    assert [headers["Authorization"] for _, headers in web.requests] == ["Bearer t0ken", "Basic dXNlcjpsZXRtZWlu"]
    for upload in remote.uploads:
        upload.close()


def test_a_presigned_query_arrives_byte_for_byte(remote: Remote) -> None:
    query = "X-Amz-Credential=AKID%2F20310401%2Feu%2Fother%2Faws4_request&X-Amz-Signature=ab%2Bcd==&x=a+b%20c~&y"
    remote.put(url=f"{remote.web.url}/b/k%20e%2Fy?{query}")
    assert [path for path, _ in remote.web.requests] == [f"/b/k%20e%2Fy?{query}"]


@pytest.mark.parametrize("base", ["/in", "/in/"])
def test_a_base_url_is_followed_by_cell_and_name(web: Recorder, base: str) -> None:
    remote = Remote("http", web)
    store = remote.store(url=web.url + base)
    store.put(CELL, "a b/c\\d", io.BytesIO(b"x"))
    assert list(web.kept) == [f"/in/{CELL}/a%20b_c_d"]
    remote.uploads[0].close()


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/{cell_id}/x/{artifact_name}", f"/{CELL}/x/{NAME}"),
        ("/up?cell={cell_id}&name={artifact_name}", f"/up?cell={CELL}&name={NAME}"),
        ("/only/{artifact_name}", f"/only/{NAME}"),
        ("/as/it/is?key=1", "/as/it/is?key=1"),
    ],
)
def test_the_forms_of_urls(remote: Remote, url: str, path: str) -> None:
    remote.put(url=remote.web.url + url)
    assert list(remote.web.kept) == [path]


def test_a_presigned_url_without_placeholders_is_used_as_it_is(web: Recorder) -> None:
    remote = Remote("s3", web)
    remote.put(url=f"{web.url}/bucket/key")
    assert list(web.kept) == ["/bucket/key"]
    remote.uploads[0].close()


SECRET = "5ignature0123456789abcdef"


@pytest.mark.parametrize(
    "echo",
    [
        "{url}",
        "<Error><Url>{escaped}</Url><SignatureProvided>{signature}</SignatureProvided></Error>",
        '{{"query": "{query}", "authorization": "Bearer {token}"}}',
        "session {session} or {quoted}",
        "x" * 500 + "{url}",
        "Basic dXNlcjpsZXQgbWUgaW4=",
    ],
)
def test_what_a_server_repeats_is_not_repeated(remote: Remote, echo: str) -> None:
    query = f"X-Amz-Expires=300&X-Amz-Security-Token=se%2FssIon%2Btoken&X-Amz-Signature={SECRET}"
    url = remote.web.url.replace("://", "://user:let%20me%20in@") + f"/b/k?{query}"
    repeated = echo.format(
        url=url,
        escaped=url.replace("&", "&amp;"),
        query=query,
        signature=SECRET,
        token="t0ken-of-the-operator" if remote.kind == "http" else "none",
        session="se/ssIon+token",
        quoted="se%2FssIon%2Btoken",
    )
    remote.web.answers = [Answer(403, repeated.encode())]
    with pytest.raises(ExportError, match=" returned 403: ") as caught:
        remote.put(url=url, token="t0ken-of-the-operator")
    text = str(caught.value)
    for secret in (SECRET[:8], "ssIon", "let", "t0ken", "dXNlcjps", "X-Amz-Expires=300"):
        assert secret not in text.partition("returned 403")[2]
        assert secret not in text.partition("returned 403")[0]


def test_a_secret_that_is_cut_off_is_not_repeated(remote: Remote) -> None:
    """What is read of an answer ends in the middle of the query."""
    query = f"X-Amz-Signature={SECRET}{'0' * 900}"
    remote.web.answers = [Answer(403, query.encode() * 100)]
    with pytest.raises(ExportError, match=r" returned 403: <redacted>") as caught:
        remote.put(url=f"{remote.web.url}/b/k?{query}")
    assert SECRET[:8] not in str(caught.value)


def test_an_answer_is_quoted_within_bounds_and_without_control_characters(remote: Remote) -> None:
    remote.web.answers = [Answer(400, b"\x1b[31mred\r\n\xff\x00" + "ü".encode() * MIB)]
    with pytest.raises(ExportError) as caught:
        remote.put()
    quoted = caught.value.text.partition("returned 400: ")[2]
    assert quoted.startswith("\\x1b[31mred\\r\\n\ufffd\\x00ü")
    assert quoted.isprintable()
    assert len(quoted.encode()) <= MOST_OF_AN_ANSWER


def test_an_unreachable_url_is_told_without_its_secrets(remote: Remote) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{closed.getsockname()[1]}"
        with pytest.raises(ExportError) as caught:
            remote.put(url=f"http://user:pw@{place}/b/k?X-Amz-Signature={SECRET}")
    assert str(caught.value) == f"export sink: {remote.kind} put http://{place}/b/k: Connection refused (os error 111)"
    # Nor does a traceback, which shows where an exception came from.
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


def test_a_source_that_cannot_be_read_twice_is_refused(remote: Remote) -> None:
    reading, writing = os.pipe()
    os.close(writing)
    with open(reading, "rb") as source, pytest.raises(ExportError, match=f"^export sink: read artifact {NAME}: it cannot be read twice"):
        remote.store().put(CELL, NAME, source)
    assert remote.web.requests == []


def test_a_source_that_shrinks_is_not_stored(remote: Remote) -> None:
    class Shrinking(io.BytesIO):
        def read(self, size: int | None = -1, /) -> bytes:
            return b"" if self.tell() else super().read(2)

    source: BinaryIO = Shrinking(b"abcdef")
    with pytest.raises(ExportError, match=f"read artifact {NAME}: it became shorter while it was read"):
        remote.store().put(CELL, NAME, source)
    assert remote.web.kept == {}


@pytest.mark.parametrize(
    ("url", "text"),
    [
        ("ftp://host/x", "{what} scheme must be http or https, got ftp"),
        ("not a url", "invalid {what}: relative URL without a base"),
        ("http://", "invalid {what}: it needs a host"),
        ("https://host:99999/x", "invalid {what}: it needs a host, and a port between 0 and 65535"),
        ("https://host/x#part", "invalid {what}: a fragment"),
        ("https://host/x?a=b c", "invalid {what}: a fragment, blanks"),
        ("https://{cell_id}.host/x", "invalid {what}: placeholders may stand in the path"),
    ],
)
def test_urls_that_cannot_be_used(remote: Remote, url: str, text: str) -> None:
    what = "HTTP export base URL" if remote.kind == "http" else "S3 presigned URL"
    with pytest.raises(ExportError) as caught:
        remote.store(url=url)
    assert caught.value.text.startswith(text.format(what=what))


def test_an_empty_url() -> None:
    with pytest.raises(ExportError, match=r"^export sink: HTTP base URL is empty after trim$"):
        HttpStore("  ", Upload("http", {}))
    with pytest.raises(ExportError, match=r"^export sink: S3 presigned URL is empty after trim$"):
        S3Store("", Upload("s3", {}), target="t", bucket="b")


def test_no_attempt_at_all_is_refused() -> None:
    for kind, label in (("http", "HTTP"), ("s3", "S3")):
        with pytest.raises(ExportError, match=f"^export sink: {label} export max_attempts must be at least 1$"):
            Upload(kind, {}, retries=Retries(max_attempts=0))  # type: ignore[arg-type]  # a tuple of literals


def test_a_certificate_of_an_unknown_authority_is_refused(tls_web: tuple[Recorder, str]) -> None:
    server, _ = tls_web
    upload = Upload("http", {})
    with pytest.raises(ExportError, match="certificate verify failed"):
        HttpStore(server.url, upload).put(CELL, NAME, io.BytesIO(b"x"))
    assert server.requests == []
    upload.close()


@pytest.mark.parametrize(
    ("region", "bucket", "text"), [("us-east-1", "archive", "is for region eu-central-1"), (None, "b", "not for bucket b")]
)
def test_a_presigned_url_for_something_else_is_refused(s3: Any, region: str | None, bucket: str, text: str) -> None:
    with pytest.raises(ExportError, match=text):
        S3Store(presigned(s3, "k"), Upload("s3", {}), target="t", bucket=bucket, region=region)
