"""`cellos up`: the whole system on this machine, NATS, server, controller and a node under one parent.

Everything lies in the directory `up` of the state directory and stays when it ends; clients of the same user find it there
(client/address.py). What dies is started again, the server at the same address. The parts end when this process does, however it ends: each
is held by a lifeline (eventlog/lifeline.py). In order, they end from the node, which lets its cells end, to NATS.

    up/lock             held while it runs; the id of the process
       parts            held while a part runs, too
       address          URL of the server, while it runs
       token            the API token, made once
       nats-url         URL of NATS with its credentials, for `NATS_URL`
       server.log       what the server of the latest start logged; so controller.log, node.log
       nats/            NATS, its store
       server/ node/    the server's snapshot, the node's state directory
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
from collections.abc import Coroutine, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
import msgspec

from cellos.cli.process import STOP_SIGNALS, say
from cellos.client.address import TOKEN, Address, read_token, up_directory
from cellos.errors import CellosError, ConfigError, os_error_text
from cellos.http.listener import listen

if TYPE_CHECKING:
    from cellos.cli.parts import Part
    from cellos.eventlog.embedded import EmbeddedNats

HOST, PORT = "127.0.0.1", 8080
REACHED_BY = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  # names, not an address to listen on
"""What listens on all addresses is called by this one."""
START_SECONDS = 60.0
STOP_SECONDS = 15.0
"""Those of a `cellos up` that was killed are gone after that."""
LOCK_SECONDS = 1.0
DRAIN = "CELLOS_NODE_DRAIN_MS"
DRAIN_MS = 5000
"""What cells have to end when somebody ends the whole: less than a node has by itself, for somebody waits."""
_POLL_SECONDS = 0.05


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

    def log(self, part: str) -> str:
        return f"{self.directory}/{part}.log"


@click.command(
    epilog="""\b
Examples:
  cellos up                            http://127.0.0.1:8080, or another port where that one is taken
  cellos up --bind 127.0.0.1:9000 --slots 8
  cellos up --dir ./here               everything under ./here; clients: CELLOS_STATE_DIR=./here cellos get cells
  cellos up --no-node                  nothing runs here; nodes elsewhere take the work

Then, in another terminal: cellos apply -f FILE --wait, cellos get cells, cellos events --follow. They find it by themselves.
Ctrl-C or SIGTERM ends it in order, exit code 0: cells that run have 5 s to end (CELLOS_NODE_DRAIN_MS). A second one ends it at once.
What was stored is there at the next start, and what was not done goes on.
"""
)
@click.option("--bind", metavar="HOST:PORT", help="Where the server listens; port 0 is a free one.")
@click.option("--dir", "directory", metavar="DIR", help="The state directory, in place of CELLOS_STATE_DIR.")
@click.option("--slots", type=click.IntRange(1, 10_000), metavar="N", help="How many cells run at once; as many as there are processors.")
@click.option("--node/--no-node", default=True, help="Whether cells run here.")
@click.option("--json", "as_json", is_flag=True, help="The status as one JSON object.")
def up(bind: str | None, directory: str | None, slots: int | None, node: bool, as_json: bool) -> None:
    """Start everything on this machine: NATS, server, controller, node; until Ctrl-C."""
    from cellos.supervisor.state import open_state_directory

    if directory == "":
        raise click.UsageError("--dir takes a directory, and is empty")
    if slots is not None and not node:
        raise click.UsageError("--slots is how many cells run here, and --no-node says none")
    variables = dict(os.environ)
    if directory is not None:
        variables["CELLOS_STATE_DIR"] = os.path.abspath(directory)
    if slots is not None:
        variables["CELLOS_NODE_SLOTS"] = str(slots)
    files = Files(up_directory(open_state_directory(variables).path))
    try:
        os.makedirs(files.directory, mode=0o700, exist_ok=True)
        with _lock(files) as held, listener_at(bind) as listener:
            asyncio.run(_run(files, listener, held, variables, node=node, as_json=as_json))
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


def status(files: Files, address: Address, nats: str, nodes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a user may want to know, by name."""
    return {
        "server": address.url,
        "token": files.token,
        "nats": nats,
        "natsUrl": files.nats_url,
        "log": files.log("server"),
        "data": files.directory,
        "nodes": [{name: each[name] for name in ("node", "slots", "classes") if name in each} for each in nodes],
    }


def block(facts: Mapping[str, Any], *, prefix: str = "") -> str:
    """The same for people, with the next command to type. `prefix` is what a command of a client has to begin with."""
    nodes = "; ".join(f"{each['node']}, {_cells(each['slots'])} at once ({', '.join(each['classes'])})" for each in facts["nodes"])
    return f"""\
CellOS is up. Ctrl-C ends it; what it stored stays.

  server   {facts["server"]}
  token    {facts["token"]}
  NATS     {facts["nats"]}
  node     {nodes or "none here"}
  logs     {facts["data"]}/*.log
  more     nodes join with    CELLOS_NATS_URL="$(cat {facts["natsUrl"]})" cellos-node
           cells report with  NATS_URL="$(cat {facts["natsUrl"]})" cellos-supervisor SPEC

Next, in another terminal:  {prefix}cellos apply -f FORMATION --wait
"""


def _cells(count: int) -> str:
    return f"{count} cell{'' if count == 1 else 's'}"


async def _run(files: Files, listener: socket.socket, held: int, ours: Mapping[str, str], *, node: bool, as_json: bool) -> None:
    """`held` is a lock that the parts keep, too. Until a signal. Raises ConfigError, EventLogError, ServerError: it did not start."""
    from cellos.daemon.process import stop_event
    from cellos.eventlog.embedded import EmbeddedNats

    # The second signal ends this process where it stands, and with it its parts.
    stop = stop_event(number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN)
    token = _token(files)
    address = Address(url=url_of(listener), token=token, given=False)
    nats = EmbeddedNats(f"{files.directory}/nats", port=_last_nats_port(files), on_trouble=_tell)
    try:
        if not await _unless(stop, nats.start()):
            return
        parts = make_parts(files, nats, listener, held, ours, token=token, node=node)
        try:
            nodes: list[Mapping[str, Any]] = []
            if not await _unless(stop, _start(parts, address, nodes)):
                return
            _write(files.nats_url, nats.url_with_credentials)
            _write(files.address, address.url)
            facts = status(files, address, nats.url, nodes)
            prefix = (
                f"CELLOS_STATE_DIR={ours['CELLOS_STATE_DIR']} "
                if ours.get("CELLOS_STATE_DIR") != os.environ.get("CELLOS_STATE_DIR")
                else ""
            )
            click.echo(json.dumps(facts) if as_json else block(facts, prefix=prefix), nl=as_json)
            sys.stdout.flush()
            await _unless(stop, _keep(parts))
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(files.address)
            for part in reversed(parts):
                if part.listens:
                    listener.close()
                await part.stop()
    finally:
        await nats.stop()


def make_parts(
    files: Files, nats: EmbeddedNats, listener: socket.socket, held: int, ours: Mapping[str, str], *, token: str, node: bool
) -> list[Part]:
    """In the order in which they start; they end in the other."""
    from cellos.cli.parts import GRACE_SECONDS, Part

    variables = environment(ours, files, nats, token=token)
    part = partial(Part, held=held, tell=_tell)
    parts = [
        part("cellos-server", "cellos.server.main", files.log("server"), variables, listener=listener.fileno()),
        part("cellos-controller", "cellos.controller.main", files.log("controller"), variables),
    ]
    if node:
        of_node = {DRAIN: str(DRAIN_MS)} | variables | {"CELLOS_STATE_DIR": f"{files.directory}/node"}
        drain = of_node[DRAIN].strip()
        grace = GRACE_SECONDS + (int(drain) / 1000 if drain.isascii() and drain.isdigit() and len(drain) < 10 else 0)
        parts.append(part("cellos-node", "cellos.node.main", files.log("node"), of_node, grace=grace))
    return parts


async def _start(parts: Sequence[Part], address: Address, nodes: list[Mapping[str, Any]]) -> None:
    """Start all of them and wait until the server answers and knows the others; `nodes` gets those that are there. Raises ServerError."""
    for part in parts:
        await part.start()
    ended: dict[asyncio.Future[Any], Part] = {asyncio.create_task(part.wait()): part for part in parts}
    deadline = time.monotonic() + START_SECONDS
    try:
        while time.monotonic() < deadline:
            asking = asyncio.create_task(asyncio.to_thread(_members, address))
            done, _ = await asyncio.wait({*ended, asking}, return_when=asyncio.FIRST_COMPLETED)
            for task in done & ended.keys():
                raise ended[task].failure("did not start")
            found = asking.result()
            if found is not None and found["controllers"] and (len(parts) < 3 or found["nodes"]):
                nodes += found["nodes"]
                return
            await asyncio.wait(ended, timeout=_POLL_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        for part in parts:
            raise part.failure(f"does not answer after {START_SECONDS:g} s")
    finally:
        for task in ended:
            task.cancel()


async def _keep(parts: Sequence[Part]) -> None:
    await asyncio.gather(*(part.keep() for part in parts))


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


def environment(ours: Mapping[str, str], files: Files, nats: EmbeddedNats, *, token: str) -> dict[str, str]:
    """The variables of the parts: ours, but for those that say where it listens, where NATS is and how to log in there."""
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


def _members(address: Address) -> Mapping[str, Any] | None:
    """The nodes and controllers that the server knows; None where it does not answer yet."""
    from cellos.client.server import Server

    try:
        with Server(address, timeout_ms=2000, pauses=()) as server:
            return server.nodes()
    except CellosError:
        return None


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
                raise ConfigError(f"a part of the `cellos up` before this one still runs; logs are {files.directory}/*.log")
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
    try:
        return read_token(files.token)
    except ConfigError as error:
        raise ConfigError(f"{files.token} holds no token; remove it and a new one is made") from error


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
        file.flush()
        os.fsync(file.fileno())
    os.replace(f"{path}.new", path)


def _tell(text: str) -> None:
    say(f"cellos up: {text}")
