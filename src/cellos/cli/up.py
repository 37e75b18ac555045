"""`cellos up`: a control plane on this machine, NATS and `cellos-server` under one parent.

Everything lies in the directory `up` of the state directory and stays when it ends; clients of the same user find it there
(client/address.py). What dies is started again, at the same address. The parts end when this process does, however it ends: each is held by
a lifeline (eventlog/lifeline.py).

    up/lock         held while it runs; the id of the process
       parts        held while the server runs, too
       address      URL of the server, while it runs
       token        the API token, made once
       nats-url     URL of NATS with its credentials, for `NATS_URL`
       server.log   what the server of the latest start logged
       nats/        NATS, its store
       server/      the server's snapshot
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import time
from collections.abc import Coroutine, Iterator, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import msgspec

from cellos.cli.process import STOP_SIGNALS, say
from cellos.client.address import TOKEN, Address, read_token, up_directory
from cellos.errors import CellosError, ConfigError, ServerError, os_error_text
from cellos.http.listener import listen

if TYPE_CHECKING:
    from cellos.eventlog.embedded import EmbeddedNats

HOST, PORT = "127.0.0.1", 8080
REACHED_BY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # names, not an address to listen on
"""What listens on all addresses is called by this one."""
START_SECONDS = 60.0
STOP_SECONDS = 15.0
"""The server has ten to drain, then its lifeline kills it."""
LOCK_SECONDS = 1.0
STEADY_SECONDS = 30.0
_POLL_SECONDS = 0.05
_LONGEST_LINE = 1 << 16


class Files(msgspec.Struct, frozen=True):
    """What lies in the directory."""

    directory: str

    @property
    def address(self) -> str:
        return f"{self.directory}/address"

    @property
    def token(self) -> str:
        return f"{self.directory}/token"

    @property
    def nats_url(self) -> str:
        return f"{self.directory}/nats-url"

    @property
    def log(self) -> str:
        return f"{self.directory}/server.log"


@click.command(
    epilog="""\b
Examples:
  cellos up                            http://127.0.0.1:8080, or another port where that one is taken
  cellos up --bind 127.0.0.1:9000

Then, in another terminal: cellos events --follow, cellos get cells, cellos apply -f FILE. They find it by themselves.
Ctrl-C or SIGTERM ends it in order, exit code 0; what was stored is there at the next start.
"""
)
@click.option("--bind", metavar="HOST:PORT", help="Where the server listens; port 0 is a free one.")
@click.option("--json", "as_json", is_flag=True, help="The status as one JSON object.")
def up(bind: str | None, as_json: bool) -> None:
    """Start a control plane on this machine: NATS and server, until Ctrl-C."""
    from cellos.supervisor.state import open_state_directory

    files = Files(up_directory(open_state_directory(os.environ).path))
    try:
        os.makedirs(files.directory, mode=0o700, exist_ok=True)
        with _lock(files) as held, listener_at(bind) as listener:
            asyncio.run(_run(files, listener, held, as_json=as_json))
    except BrokenPipeError:
        raise
    except OSError as error:
        raise ConfigError(f"cellos up: {error.filename or files.directory}: {os_error_text(error)}") from error


def listener_at(bind: str | None) -> socket.socket:
    """A socket that listens there, or else at the usual address or on another port of it. Raises ConfigError."""
    if bind is None:
        try:
            return listen(HOST, PORT)
        except OSError:
            return listen(HOST, 0)
    host, _, digits = bind.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and digits.isascii() and digits.isdigit() and len(digits) <= 5 and int(digits) <= 65535):
        raise ConfigError(f"--bind {bind}: not HOST:PORT, for example {HOST}:{PORT}")
    try:
        return listen(host, int(digits))
    except OSError as error:
        raise ConfigError(f"--bind {bind}: {os_error_text(error)}; {HOST}:0 takes a free port") from error


def url_of(listener: socket.socket) -> str:
    """By which clients on this machine reach it."""
    host, port = listener.getsockname()[:2]
    return f"http://{joined(REACHED_BY.get(host, host), port)}"


def joined(host: str, port: int) -> str:
    """HOST:PORT, as it stands in a URL."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def status(files: Files, address: Address, nats: str) -> dict[str, str]:
    """What a user may want to know, by name."""
    return {"server": address.url, "token": files.token, "nats": nats, "natsUrl": files.nats_url, "log": files.log, "data": files.directory}


def block(facts: Mapping[str, str]) -> str:
    """The same for people, with the next command to type."""
    return f"""\
The control plane is up. Ctrl-C ends it; what it stored stays.

  server   {facts["server"]}
  token    {facts["token"]}
  NATS     {facts["nats"]}
  log      {facts["log"]}
  cells    report here with  NATS_URL="$(cat {facts["natsUrl"]})" cellos-supervisor SPEC

Next, in another terminal:  cellos events --follow
"""


async def _run(files: Files, listener: socket.socket, held: int, *, as_json: bool) -> None:
    """`held` is a lock that the parts keep, too. Until a signal. Raises ConfigError, EventLogError, ServerError: it did not start."""
    from cellos.eventlog.embedded import EmbeddedNats

    stop = _stop_event()
    token = _token(files)
    address = Address(url=url_of(listener), token=token, given=False)
    nats = EmbeddedNats(f"{files.directory}/nats", port=_last_nats_port(files), on_trouble=_tell)
    try:
        if not await _unless(stop, nats.start()):
            return
        server = _Server(files, address, environment(os.environ, files, nats, token=token), listener, held)
        try:
            if not await _unless(stop, server.start()):
                return
            _write(files.nats_url, nats.url_with_credentials)
            _write(files.address, address.url)
            facts = status(files, address, nats.url)
            click.echo(json.dumps(facts) if as_json else block(facts), nl=as_json)
            sys.stdout.flush()
            await _unless(stop, server.keep())
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.address)
            await server.stop()
    finally:
        await nats.stop()


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether some work was done before somebody asked to stop."""
    doing = asyncio.create_task(work)
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait({doing, stopping}, return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    if not doing.done():
        doing.cancel()
        await asyncio.wait({doing})
        return False
    doing.result()
    return True


class _Server:
    """`cellos-server` as a child. It is given a socket that listens, which stays ours: clients wait while it is started again."""

    def __init__(self, files: Files, address: Address, variables: Mapping[str, str], listener: socket.socket, held: int) -> None:
        self._files = files
        self._listener = listener
        self._held = held
        self._address = address
        self._variables = variables
        self._process: asyncio.subprocess.Process | None = None
        self._started = 0.0

    async def start(self) -> None:
        """Start, and wait until it answers. Raises ServerError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._files.log)
        ended = asyncio.create_task((await self._launch()).wait())
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and not ended.done():
            answering = asyncio.create_task(asyncio.to_thread(_answers, self._address))
            await asyncio.wait({ended, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() and answering.result():
                ended.cancel()
                return
            await asyncio.wait({ended}, timeout=_POLL_SECONDS)
        self._listener.close()  # whoever waits for an answer, we ourselves among them, is told that none will come
        how = "did not start" if ended.done() else f"does not answer after {START_SECONDS:g} s"
        raise ServerError(f"cellos-server {how}: {last_words(self._files.log) or 'it said nothing'}; its log is {self._files.log}")

    async def keep(self) -> None:
        """Start it again, as often as it ends. Does not return."""
        from cellos.eventlog.connect import pause

        attempt = 0
        while self._process is not None:
            code = await self._process.wait()
            attempt = 0 if time.monotonic() - self._started > STEADY_SECONDS else attempt + 1
            _tell(f"cellos-server ended with exit code {code} and is started again; its log is {self._files.log}")
            await asyncio.sleep(pause(attempt) if attempt > 1 else 0)
            await self._launch()

    async def stop(self) -> None:
        """In order. Idempotent."""
        self._listener.close()
        process, self._process = self._process, None
        if process is None:
            return
        from cellos.eventlog.embedded import end

        await end(process, STOP_SECONDS)

    async def _launch(self) -> asyncio.subprocess.Process:
        from cellos.eventlog import lifeline

        handed = self._listener.fileno()
        # -P: nothing is imported from the directory that we happen to be in.
        program = [sys.executable, "-P", "-m", "cellos.server.main"]
        command = [sys.executable, "-I", "-S", lifeline.__file__, f"--listen={handed}", *program]
        log = os.open(self._files.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        try:
            self._process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=self._variables,
                start_new_session=True,  # ^C in a terminal is for its owner, who ends the parts in order
                pass_fds=(self._held, handed),
            )
        finally:
            os.close(log)
        self._started = time.monotonic()
        return self._process


def environment(ours: Mapping[str, str], files: Files, nats: EmbeddedNats, *, token: str) -> dict[str, str]:
    """The variables of the server: ours, but for those that say where it listens, where NATS is and how to log in there."""
    from cellos.eventlog.connect import VARIABLES

    others = {"CELLOS_SERVER_BIND", *(variable.name for variable in VARIABLES)}
    kept = {name: value for name, value in ours.items() if name not in others}
    return (
        {"CELLOS_NATS_STREAM_MAX_BYTES": str(nats.max_stream_bytes)}
        | kept
        | {
            TOKEN: token,
            "CELLOS_SERVER_STATE_DIR": f"{files.directory}/server",
            "CELLOS_NATS_URL": nats.url_with_credentials,
        }
    )


def last_words(path: str) -> str:
    """Why a server ended, by the last lines of its log."""
    try:
        with open(path, "rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LONGEST_LINE))
            lines = file.read().decode(errors="replace").splitlines()
    except OSError:
        return ""
    for line in reversed(lines):
        try:
            record = json.loads(line)
            if record["level"] == "ERROR":
                return str(record["fields"].get("error") or record["fields"]["message"])
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return lines[-1] if lines else ""


def _answers(address: Address) -> bool:
    from cellos.client.server import Server

    try:
        with Server(address, timeout_ms=2000, pauses=()) as server:
            server.version()
    except CellosError:
        return False
    return True


@contextlib.contextmanager
def _lock(files: Files) -> Iterator[int]:
    """That no other one runs here: one lock of ours, which tells clients that we are there, and one that is inherited by the server.

    After a kill of the one before, its server needs a moment to go: until then its port and its snapshot are in use. Raises ConfigError.
    """
    with _held(f"{files.directory}/lock", LOCK_SECONDS) as lock:
        if lock is None:
            pid = _text(f"{files.directory}/lock")
            raise ConfigError(f"`cellos up` runs already for {files.directory}, as process {pid}; end it with: kill {pid}")
        with contextlib.suppress(FileNotFoundError):
            os.unlink(files.address)  # of one that was killed: somebody else may listen there now
        os.ftruncate(lock, 0)
        os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
        with _held(f"{files.directory}/parts", STOP_SECONDS) as parts:
            if parts is None:
                raise ConfigError(f"a server of the `cellos up` before this one still runs; its log is {files.log}")
            yield parts


@contextlib.contextmanager
def _held(path: str, seconds: float) -> Iterator[int | None]:
    """A lock, or None where somebody keeps it for that long. A client that looks whether it is held holds it for a moment."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    deadline = time.monotonic() + seconds
    try:
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    yield None
                    return
                time.sleep(_POLL_SECONDS)
            else:
                yield descriptor
                return
    finally:
        os.close(descriptor)


def _text(path: str) -> str:
    with open(path, errors="replace") as file:
        return file.read(20).strip()


def _token(files: Files) -> str:
    """That of this directory; made once. Raises ConfigError."""
    if not os.path.exists(files.token):
        _write(files.token, secrets.token_urlsafe(32))
    os.chmod(files.token, 0o600)
    return read_token(files.token)


def _last_nats_port(files: Files) -> int:
    """That of the latest start where it is free, so that programs which have its URL need no new one; else -1, any."""
    try:
        with open(files.nats_url) as file:
            port = urlsplit(file.read().strip()).port
        if port is None:
            return -1
        listen(HOST, port).close()
    except (OSError, ValueError):
        return -1
    return port


def _write(path: str, text: str) -> None:
    """Whole or not at all, and never readable for others."""
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    with open(descriptor, "w") as file:
        file.write(f"{text}\n")
    os.replace(f"{path}.new", path)


def _stop_event() -> asyncio.Event:
    """Set by the first signal that asks us to stop. The second one ends this process where it stands, and with it its parts."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def heard(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            loop.add_signal_handler(number, heard, number)
    return stop


def _tell(text: str) -> None:
    say(f"cellos up: {text}")
