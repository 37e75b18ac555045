"""Every backend keeps the promises of its port."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cellos.backends.linux import LinuxBackend
from cellos.backends.settings import LinuxSettings
from cellos.backends.stub import StubBackend
from cellos.ports import CellBackend
from cellos.sandbox.launcher import Launcher
from cellos.sandbox.seccomp import denying
from cellos.testing.backend import FakeBackend
from cellos.testing.conformance import BackendConformance


@pytest.fixture(scope="module")
def launcher() -> Iterator[Launcher]:
    with Launcher.start() as started:
        yield started


class TestFake(BackendConformance):
    """A fake that behaves otherwise than the real ones would make the tests that rely on it worthless."""

    @pytest.fixture
    def backend(self) -> CellBackend:
        return FakeBackend()

    def exits(self, code: int) -> list[str]:
        return ["exits", str(code)]

    def dies(self, signal: int) -> list[str]:
        return ["dies", str(signal)]

    def writes(self, out: str, error: str = "") -> list[str]:
        return ["writes", out, error]

    def environment(self) -> list[str]:
        return ["environment"]

    def copies(self) -> list[str]:
        return ["copies"]

    def sleeps(self) -> list[str]:
        return ["sleeps"]

    def stubborn(self) -> list[str]:
        return ["stubborn"]

    def leaves_a_child(self) -> list[str]:
        return ["exits", "0"]

    def asks(self, path: str) -> list[str]:
        return ["asks", path]

    def makes_file(self, path: str, text: str) -> list[str]:
        return ["file", path, text]

    def makes_link(self, path: str) -> list[str]:
        return ["link", path]

    def makes_fifo(self, path: str) -> list[str]:
        return ["fifo", path]

    def not_executable(self) -> list[str]:
        return ["unreadable"]


class TestStub(BackendConformance):
    work_directory = None

    @pytest.fixture
    def backend(self) -> CellBackend:
        return StubBackend()


@pytest.mark.linux_backend
class TestLinux(BackendConformance):
    @pytest.fixture
    def backend(self, launcher: Launcher) -> CellBackend:
        return LinuxBackend(launcher=launcher)


@pytest.mark.linux_backend
class TestLinuxWithAnotherFilter(BackendConformance):
    """A command with a filter of the operator's is started another way, and nobody sees a difference."""

    @pytest.fixture
    def backend(self, launcher: Launcher) -> CellBackend:
        return LinuxBackend(launcher=launcher, settings=LinuxSettings(program=denying({})))
