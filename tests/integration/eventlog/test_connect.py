"""Connections to real servers: every way to log in, TLS, versions, and a client that never gives up: what is overridden of nats-py."""

from __future__ import annotations

import asyncio
import base64
import gc
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from nats.aio.client import Client

from cellos.errors import LogTooOld
from cellos.eventlog.connect import LogClient, Settings, connect, require_version
from cellos.eventlog.link import open_link
from cellos.eventlog.log import EventLog
from cellos.eventlog.nkey import Nkey, _encoded
from cellos.eventlog.reader import Reader
from cellos.eventlog.stream import ensure_stream
from cellos.testing.nats_server import NatsServer

Run = Callable[..., None]
SECRET = "s3cr:t@/%"


class Key:
    """An NKey of any kind, as `nsc` would make it."""

    def __init__(self, kind: int) -> None:
        self._key = Ed25519PrivateKey.generate()
        raw = self._key.private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())
        self.seed = _encoded(bytes([18 << 3 | kind >> 5, (kind & 31) << 3]) + raw)
        self.public = _encoded(bytes([kind]) + self._key.public_key().public_bytes(Encoding.Raw, PublicFormat.Raw))

    def jwt(self, subject: str, claims: dict[str, Any]) -> str:
        """Signed by this key."""

        def part(value: Any) -> str:
            raw = value if isinstance(value, bytes) else json.dumps(value).encode()
            return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()

        body = {
            "jti": subject,
            "iat": int(time.time()),
            "iss": self.public,
            "sub": subject,
            "name": "test",
            "nats": {"version": 2} | claims,
        }
        text = f"{part({'typ': 'JWT', 'alg': 'ed25519-nkey'})}.{part(body)}"
        return f"{text}.{part(self._key.sign(text.encode()))}"


OPERATOR, ACCOUNT, USER = 14 << 3, 0, 20 << 3


def framed_seed(seed: str) -> str:
    return f"-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n"


async def works(settings: Settings) -> None:
    """Both our connections: that of nats-py, and the reader's own."""
    client = await connect(settings, name="test")
    await ensure_stream(client, max_bytes=1 << 20)
    await EventLog(client).publish("cellos.events.x", b"{}", message_id="1")
    async with Reader(client) as reader:
        assert [stored.message_id for stored in await reader.read()] == ["1"]
    await client.close()


async def is_refused(settings: Settings) -> str:
    """Why neither of them gets in."""
    reasons: list[str] = []
    told = asyncio.Event()

    def trouble(text: str) -> None:
        reasons.append(text)
        told.set()

    attempt = asyncio.create_task(connect(settings, name="test", on_trouble=trouble))
    await told.wait()
    attempt.cancel()
    with pytest.raises(asyncio.CancelledError):
        await attempt
    told.clear()
    async with Reader(LogClient(settings), on_trouble=trouble) as reader:
        reading = asyncio.create_task(reader.read())
        await told.wait()
        reading.cancel()
    assert SECRET not in "".join(reasons)
    assert "s3cr" not in "".join(reasons)
    return "; ".join(reasons)


def authorization(**members: str) -> str:
    return f"authorization {{ {', '.join(f'{name}: {json.dumps(value)}' for name, value in members.items())} }}"


WAYS: dict[str, tuple[str, Callable[[str], Settings]]] = {
    "user and password": (
        authorization(user="u", password=SECRET),
        lambda address: Settings(url=f"nats://{address}", user="u", password=SECRET),
    ),
    "user and password in the URL": (
        authorization(user="u", password=SECRET),
        lambda address: Settings(url=f"nats://u:s3cr%3At%40%2F%25@{address}"),
    ),
    "token": (authorization(token=SECRET), lambda address: Settings(url=f"nats://{address}", token=SECRET)),
    "token in the URL": (authorization(token=SECRET), lambda address: Settings(url=f"nats://s3cr%3At%40%2F%25@{address}")),
}


@pytest.mark.parametrize("way", WAYS)
def test_logging_in(make_server: Callable[..., NatsServer], run: Run, way: str) -> None:
    configuration, settings = WAYS[way]
    server = make_server(configuration)
    run(works(settings(server.address)))


@pytest.mark.parametrize(
    "settings",
    [{}, {"user": "u", "password": "s3cr:wrong"}, {"token": "s3cr-token"}],
    ids=lambda settings: ",".join(settings) or "none",
)
def test_who_may_not_in_is_told_so_without_the_secret(make_server: Callable[..., NatsServer], run: Run, settings: dict[str, str]) -> None:
    server = make_server(authorization(user="u", password=SECRET))

    async def test() -> None:
        assert "Authorization Violation" in await is_refused(Settings(url=server.url, **settings))

    run(test())


def test_an_nkey(make_server: Callable[..., NatsServer], run: Run, tmp_path: Path) -> None:
    key, other = Key(USER), Key(USER)
    server = make_server(f"authorization {{ users: [ {{ nkey: {key.public} }} ] }}")
    (tmp_path / "seed").write_text(key.seed + "\n")
    (tmp_path / "framed").write_text(framed_seed(key.seed))
    (tmp_path / "other").write_text(other.seed)
    run(works(Settings(url=server.url, nkey_seed_file=str(tmp_path / "seed"))))
    run(works(Settings(url=server.url, nkey_seed_file=str(tmp_path / "framed"))))

    async def test() -> None:
        assert "Authorization Violation" in await is_refused(Settings(url=server.url, nkey_seed_file=str(tmp_path / "other")))

    run(test())


def test_a_credential_file(make_server: Callable[..., NatsServer], run: Run, tmp_path: Path) -> None:
    operator, account, system, user = Key(OPERATOR), Key(ACCOUNT), Key(ACCOUNT), Key(USER)
    counts = dict.fromkeys(("subs", "data", "payload", "imports", "exports", "conn", "leaf", "streams", "consumer"), -1)

    def limits(disk: int) -> dict[str, Any]:
        return {"type": "account", "limits": counts | {"wildcards": True, "mem_storage": disk, "disk_storage": disk}}

    # A system account may not have JetStream.
    claims = {account.public: limits(-1), system.public: limits(0)}
    preload = ", ".join(f"{public}: {operator.jwt(public, claim)}" for public, claim in claims.items())
    server = make_server(
        f"operator: {operator.jwt(operator.public, {'type': 'operator', 'system_account': system.public})}\n"
        f"system_account: {system.public}\nresolver: MEMORY\nresolver_preload: {{ {preload} }}"
    )
    jwt = account.jwt(user.public, {"type": "user", "subs": -1, "data": -1, "payload": -1})
    path = tmp_path / "user.creds"
    path.write_text(f"-----BEGIN NATS USER JWT-----\n{jwt}\n------END NATS USER JWT------\n\n{framed_seed(user.seed)}")
    run(works(Settings(url=server.url, creds_file=str(path))))


# ---------------------------------------------------------------- TLS


def tls(certificates: Path, more: str = "") -> str:
    return f'tls {{ cert_file: "{certificates}/server.pem", key_file: "{certificates}/server.key" }}\n{more}'


@pytest.mark.parametrize("scheme", ["nats", "tls"])
def test_tls(make_server: Callable[..., NatsServer], run: Run, certificates: Path, scheme: str) -> None:
    server = make_server(tls(certificates))
    run(works(Settings(url=f"{scheme}://{server.address}", ca_file=str(certificates / "ca.pem"))))


def test_a_link_ends_without_waiting_for_the_farewell_of_tls(make_server: Callable[..., NatsServer], run: Run, certificates: Path) -> None:
    server = make_server(tls(certificates))
    settings = Settings(url=server.url, ca_file=str(certificates / "ca.pem"))

    async def test() -> None:
        link = await open_link(settings, settings.servers[0], name="test", on_items=lambda _: None, on_end=lambda: None)
        server.pause()
        link.close()

    run(test())
    server.go_on()
    gc.collect()  # warns of what was not closed, which is an error in tests


def test_where_tls_is_only_offered_a_ca_file_demands_it(make_server: Callable[..., NatsServer], run: Run, certificates: Path) -> None:
    server = make_server(tls(certificates, "allow_non_tls: true"))

    async def test() -> None:
        settings = Settings(url=server.url, ca_file=str(certificates / "ca.pem"))
        client = await connect(settings, name="test")
        assert client._transport._io_writer.get_extra_info("ssl_object") is not None
        await client.close()

    run(test())
    run(works(Settings(url=server.url, ca_file=str(certificates / "ca.pem"))))


def test_a_server_of_an_unknown_authority_is_refused(make_server: Callable[..., NatsServer], run: Run, certificates: Path) -> None:
    server = make_server(tls(certificates))

    async def test() -> None:
        assert (await is_refused(Settings(url=f"tls://{server.address}"))).count("certificate is not accepted") == 2

    run(test())


def test_what_is_meant_for_tls_is_never_sent_in_the_clear(server: NatsServer, run: Run) -> None:
    async def test() -> None:
        assert (await is_refused(Settings(url=f"tls://u:s3cr@{server.address}"))).count("offers no TLS") == 2

    run(test())


# ---------------------------------------------------------------- versions


async def pretended(version: str) -> tuple[asyncio.Server, Settings]:
    """A server that says INFO and PONG."""

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        info = {"server_id": "x", "version": version, "headers": True, "max_payload": 1 << 20}
        writer.write(b"INFO " + json.dumps(info).encode() + b"\r\n")
        while line := await reader.readline():
            if line == b"PING\r\n":
                writer.write(b"PONG\r\n")
        writer.close()

    listener = await asyncio.start_server(serve, "127.0.0.1", 0)
    return listener, Settings(url=f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}")


@pytest.mark.parametrize(
    ("version", "is_enough"),
    [("2.12.0", True), ("2.12.0-RC.1", True), ("2.15.1", True), ("3.0.0", True), ("2.11.9", False), ("2.2.0", False), ("latest", False)],
)
def test_old_servers_are_refused_by_name(run: Run, version: str, is_enough: bool) -> None:
    async def test() -> None:
        listener, settings = await pretended(version)
        client = await connect(settings, name="test")
        if is_enough:
            require_version(client)
        else:
            with pytest.raises(LogTooOld, match=rf"127\.0\.0\.1:\d+ is version {version}; 2\.12 or later"):
                require_version(client)
        await client.close()
        listener.close()

    run(test())


# ---------------------------------------------------------------- never giving up


def test_it_connects_when_the_server_appears_and_again_when_it_comes_back(server: NatsServer, run: Run, until: Any) -> None:
    async def test() -> None:
        heard: list[str] = []
        troubles: list[str] = []

        async def note(word: str) -> None:
            heard.append(word)

        server.stop()
        connecting = asyncio.create_task(
            connect(
                Settings(url=server.url),
                name="test",
                on_disconnect=lambda: note("lost"),
                on_reconnect=lambda: note("back"),
                on_trouble=troubles.append,
            )
        )

        async def has_complained() -> bool:
            return bool(troubles)

        await until(has_complained)
        server.start()
        client = await connecting
        assert client.is_connected
        assert len(troubles) == 1
        for _ in range(2):
            server.kill()
            server.start()

            async def is_back() -> bool:
                return heard[-1:] == ["back"] and client.is_connected

            await until(is_back)
            heard.append("—")
        await client.close()
        assert heard == ["lost", "back", "—", "lost", "back", "—"]

    run(test())


def test_an_attempt_that_fails_leaves_no_connection(run: Run, until: Any) -> None:
    """Neither to this host nor to the server, which may have a limit on them."""

    async def test() -> None:
        writers: list[asyncio.StreamWriter] = []
        ended: list[int] = []

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            number = len(writers)
            writers.append(writer)
            writer.write(b'INFO {"server_id": "x", "version": "2.12.0", "headers": true, "max_payload": 1048576}\r\n')
            while line := await reader.readline():
                if line == b"PING\r\n":
                    writer.write(b"-ERR 'no'\r\n" if number else b"PONG\r\n")
            ended.append(number)
            writer.close()

        async def three_failed() -> bool:
            return len(writers) > 3

        async def are_gone() -> bool:
            return {*range(len(writers) - 1)} <= {*ended}

        listener = await asyncio.start_server(serve, "127.0.0.1", 0)
        client = await connect(Settings(url=f"nats://127.0.0.1:{listener.sockets[0].getsockname()[1]}"), name="test")
        writers[0].close()
        await until(three_failed)
        await until(are_gone)
        await client.close()
        client.hang_up()
        listener.close()

    run(test())


def test_an_error_of_the_server_does_not_close_the_client(server: NatsServer, run: Run, until: Any) -> None:
    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        await client._send_command(b"NONSENSE\r\n")  # answered with -ERR and the end of the connection
        await client._flush_pending()

        async def is_back() -> bool:
            return client.stats["reconnects"] == 1 and client.is_connected

        await until(is_back)
        await client.close()

    run(test())


def test_an_exception_of_the_parser_does_not_leave_it_deaf(server: NatsServer, run: Run, until: Any, monkeypatch: Any) -> None:
    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        await ensure_stream(client, max_bytes=1 << 20)

        async def broken(self: Client, *_: Any) -> None:
            monkeypatch.undo()
            raise LookupError("of a parser")

        monkeypatch.setattr(Client, "_process_pong", broken)
        await client._send_ping()

        async def is_back() -> bool:
            return client.stats["reconnects"] == 1 and client.is_connected

        await until(is_back)
        await ensure_stream(client, max_bytes=1 << 20)
        await client.close()

    run(test())


def test_nothing_of_a_broken_connection_is_sent_on_the_next(server: NatsServer, run: Run, until: Any) -> None:
    async def test() -> None:
        client = await connect(Settings(url=server.url), name="test")
        await ensure_stream(client, max_bytes=1 << 20)
        await client._send_command(b"PUB cellos.events.late 2\r\n{}\r\n")  # queued, not flushed
        await client._process_op_err(ConnectionResetError())

        async def is_back() -> bool:
            return client.stats["reconnects"] == 1 and client.is_connected

        await until(is_back)
        await client.flush()
        assert (await ensure_stream(client, max_bytes=1 << 20)).messages == 0
        await client.close()

    run(test())


def test_the_key_that_a_server_knows_is_ours() -> None:
    key = Key(USER)
    assert Nkey(key.seed, where="test").public == key.public
