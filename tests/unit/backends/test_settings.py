"""What the environment says of isolation: every form, and every refusal by name."""

from __future__ import annotations

import contextlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.backends.settings import NO_LIMIT, LinuxSettings, check_stub_settings, read_linux_settings
from cellos.errors import ConfigError

MEMORY, CPU = "CELLOS_CGROUP_MEMORY_MAX", "CELLOS_CGROUP_CPU_MAX"
UNSHARE, SECCOMP, PROGRAM = "CELLOS_SUBPROCESS_UNSHARE", "CELLOS_SUBPROCESS_SECCOMP", "CELLOS_SECCOMP_BPF_PATH"
ALLOW = bytes.fromhex("060000000000ff7f")


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "filter.bpf"
    path.write_bytes(ALLOW)
    return str(path)


def test_nothing_said() -> None:
    assert read_linux_settings({}) == LinuxSettings()
    assert read_linux_settings(dict.fromkeys((MEMORY, CPU, UNSHARE, SECCOMP, PROGRAM), " ")) == LinuxSettings()
    assert check_stub_settings({}) == ()


# -- limits


@pytest.mark.parametrize(
    ("text", "size"),
    [("max", NO_LIMIT), ("1048576", 1 << 20), (" 64M ", 64 << 20), ("1g", 1 << 30), ("2T", 2 << 40), ("512k", 512 << 10)],
)
def test_memory(text: str, size: int) -> None:
    assert read_linux_settings({MEMORY: text}).memory_bytes == size


@pytest.mark.parametrize("text", ["0", "-1", "64 M", "M", "1.5G", "64MB", "0x10", "maximum", "\u0661", "1" * 30, "\x1b[2J"])
def test_memory_in_no_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_MEMORY_MAX: expected `max`, `<bytes>`, .* \(got ") as caught:
        read_linux_settings({MEMORY: text})
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("text", "quota", "period"),
    [("max", NO_LIMIT, 100_000), ("max 50000", NO_LIMIT, 50_000), ("200000", 200_000, 100_000), (" 5000  20000 ", 5_000, 20_000)],
)
def test_processor_time(text: str, quota: int, period: int) -> None:
    settings = read_linux_settings({CPU: text})
    assert (settings.cpu_quota_micros, settings.cpu_period_micros) == (quota, period)


@pytest.mark.parametrize("text", ["0", "1000 0", "max max", "1000 max", "1 2 3", "1000,2000", "-5", "half", "max -1", "1e5"])
def test_processor_time_in_no_form(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_CPU_MAX: expected `max`, `<quota_micros>`, "):
        read_linux_settings({CPU: text})


@pytest.mark.parametrize("text", ["999", "5000 999", "max 1000001"])
def test_processor_time_that_the_kernel_does_not_take(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^CELLOS_CGROUP_CPU_MAX: the kernel takes a (quota|period) of 1000"):
        read_linux_settings({CPU: text})


@given(st.text())
def test_any_text_is_read_or_refused(text: str) -> None:
    for name in (MEMORY, CPU, SECCOMP):
        with contextlib.suppress(ConfigError):
            read_linux_settings({name: text})


# -- namespaces


@pytest.mark.parametrize("text", ["1", "default", "pid,ipc,net,uts,mnt", "mount", "ns pid"])
def test_namespaces_that_every_cell_has(text: str) -> None:
    assert read_linux_settings({UNSHARE: text}) == LinuxSettings()
    with pytest.raises(ConfigError, match=f"^{UNSHARE} asks for isolation, and the stub backend isolates nothing"):
        check_stub_settings({UNSHARE: text})


def test_an_unknown_namespace_is_a_warning() -> None:
    warning = f'{UNSHARE}: "pidd" is no namespace and is ignored; known: pid, ipc, net, uts, mnt'
    assert read_linux_settings({UNSHARE: "pidd,net"}).warnings == (warning,)
    assert check_stub_settings({UNSHARE: "pidd"}) == (warning,)


# -- system call filters


@pytest.mark.parametrize("word", ["0", "off", "none", "1", "default", "baseline", "Baseline "])
def test_words_that_change_nothing(word: str) -> None:
    """Our filter is there whatever they say."""
    assert read_linux_settings({SECCOMP: word}) == LinuxSettings()


@pytest.mark.parametrize("word", [None, "", "bpf", "path", "FILE"])
def test_a_program_is_taken_as_it_is(word: str | None, program: str) -> None:
    environment = {PROGRAM: program} | ({} if word is None else {SECCOMP: word})
    assert read_linux_settings(environment).program == ALLOW
    with pytest.raises(ConfigError, match=f"^{PROGRAM} asks for isolation"):
        check_stub_settings(environment)


def test_the_largest_program(tmp_path: Path) -> None:
    path = tmp_path / "filter.bpf"
    path.write_bytes(ALLOW * 4096)
    assert read_linux_settings({PROGRAM: str(path)}).program == ALLOW * 4096


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "seccomp BPF program is empty"),
        (b"x" * 12, "seccomp BPF length 12 is not a multiple of 8 (sock_filter size)"),
        (ALLOW * 4097, "seccomp BPF program too large (max 32768 bytes)"),
        (None, "No such file or directory (os error 2)"),
    ],
)
def test_a_program_that_is_none(tmp_path: Path, content: bytes | None, fault: str) -> None:
    path = tmp_path / "filter.bpf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        read_linux_settings({PROGRAM: str(path)})
    assert str(caught.value) == f"seccomp: {PROGRAM} {path}: {fault}"


def test_a_directory_is_no_program(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"Is a directory \(os error 21\)$"):
        read_linux_settings({PROGRAM: str(tmp_path)})


@pytest.mark.parametrize("check", [read_linux_settings, check_stub_settings])
@pytest.mark.parametrize(
    ("word", "path", "text"),
    [
        ("on", "", 'seccomp: CELLOS_SUBPROCESS_SECCOMP must be one of: 1, default, baseline, bpf, 0, off, none (got "on")'),
        ("bpf", "", "seccomp: CELLOS_SUBPROCESS_SECCOMP=bpf requires CELLOS_SECCOMP_BPF_PATH"),
        ("1", "/f", "seccomp: CELLOS_SUBPROCESS_SECCOMP=baseline cannot be combined with CELLOS_SECCOMP_BPF_PATH (/f)"),
        ("off", "/f", "seccomp: CELLOS_SUBPROCESS_SECCOMP=off cannot be combined with CELLOS_SECCOMP_BPF_PATH (/f)"),
    ],
)
def test_words_that_contradict(check: object, word: str, path: str, text: str) -> None:
    assert callable(check)
    with pytest.raises(ConfigError) as caught:
        check({SECCOMP: word, PROGRAM: path})
    assert str(caught.value) == text


# -- the stub


@pytest.mark.parametrize(
    ("name", "value"),
    [("CELLOS_CGROUP_PARENT", "/sys/fs/cgroup/x"), (MEMORY, "64M"), (CPU, "max"), (UNSHARE, "net"), (SECCOMP, "baseline")],
)
def test_the_stub_is_asked_for_nothing(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"^{name} asks for isolation, and the stub backend isolates nothing; unset it"):
        check_stub_settings({name: value})


def test_the_stub_may_be_told_to_filter_nothing() -> None:
    assert check_stub_settings({SECCOMP: "off"}) == ()
