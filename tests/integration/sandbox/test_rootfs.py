"""The root of a cell, as programs in it find it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from msgspec import structs

from cellos.backends.linux import LinuxBackend
from cellos.core.documents import CellSpec, Filesystem, Mount
from cellos.errors import HostBackendError
from cellos.sandbox import rootfs

pytestmark = pytest.mark.linux_backend

Said = Callable[[str], str]


def test_it_holds_only_what_it_should(said: Said) -> None:
    names = {name.split("/")[0] for name in rootfs.DIRECTORIES} | {name for name in rootfs.MERGED_USR if os.path.islink(f"/{name}")}
    assert set(said("ls -A /").split()) == names
    assert said("ls -A /home /root /mnt /opt /run /var /.empty | grep -v ':$'").split() == ["cellos", "tmp"]
    assert said("ls -AF /run/cellos").split() == ["secrets.sock="]
    assert said("ls -A /work /tmp /dev/shm | grep -v ':$' || true").split() == []


def mounts(text: str) -> dict[str, tuple[set[str], str]]:
    """Mount point to options and file system type; the topmost where several lie on each other."""
    table = {}
    for line in text.splitlines():
        head, _, tail = line.partition(" - ")
        fields = head.split(" ")
        table[fields[4]] = (set(fields[5].split(",")), tail.split(" ")[0])
    return table


def test_every_mount_is_as_closed_as_it_can_be(said: Said) -> None:
    table = mounts(said("cat /proc/self/mountinfo"))
    scratch = {"/work", "/tmp", "/dev/shm"}
    devices = {f"/dev/{name}" for name in rootfs.DEVICES}
    masks = {f"/proc/{name}" for name in rootfs.PROC_MASKED_FILES}
    for place, (options, kind) in table.items():
        if place in devices | masks:  # nodes of the host: their times are not the cell's to set
            assert {"ro", "nosuid", "noexec"} <= options, place
            continue
        assert "nosuid" in options, place
        assert "nodev" in options, place
        if place in scratch | {"/proc"}:
            assert "rw" in options
        else:
            assert "ro" in options, place
        assert kind != "sysfs", "the host's hardware is nobody's business"
    assert scratch | {"/", "/usr", "/proc", "/proc/sys"} <= set(table)


def test_nothing_of_the_host_is_seen_in_the_mounts(said: Said) -> None:
    text = said("cat /proc/self/mountinfo")
    host_roots = {line.split(" ")[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
    inside = {line.split(" ")[4] for line in text.splitlines()}
    assert not {root for root in host_roots & inside if root.startswith(("/home", "/root", "/sys", "/run", "/boot", "/mnt"))}


@pytest.mark.parametrize("name", sorted(rootfs.ETC_FILES))
def test_the_files_of_etc_are_ours(said: Said, name: str) -> None:
    assert said(f"cat /etc/{name}") == rootfs.ETC_FILES[name]


def test_etc_has_nothing_else_of_the_host(said: Said) -> None:
    allowed = {name.split("/")[0] for name in (*rootfs.ETC_FILES, *rootfs.ETC_COPIED, *rootfs.etc_bound(), "ssl", "pki")}
    assert set(said("ls -A /etc").split()) <= allowed
    assert "shadow" not in allowed


@pytest.mark.parametrize("name", [name for name in sorted(rootfs.etc_bound()) if os.path.isdir(f"/etc/{name}")])
def test_directories_of_etc_that_runtimes_need_are_the_hosts(said: Said, name: str) -> None:
    assert set(said(f"ls -A /etc/{name}").split()) == set(os.listdir(f"/etc/{name}"))


def test_who_and_where_a_program_is(said: Said) -> None:
    assert said("id; hostname; pwd; echo $HOME; cat /proc/sys/kernel/hostname").splitlines() == [
        "uid=1000(cell) gid=1000(cell) groups=1000(cell)",
        "cell",
        "/work",
        "/work",
        "cell",
    ]


@pytest.mark.parametrize("place", ["/", "/usr", "/etc", "/dev", "/proc", "/sys", "/home", "/root", "/run", "/var", "/opt", "/mnt", "/bin"])
def test_it_can_be_written_to_nowhere_else(said: Said, place: str) -> None:
    assert said(f"touch {place}/x 2>/dev/null || echo no") == "no\n"


@pytest.mark.parametrize("place", ["/work", "/tmp", "/var/tmp", "/dev/shm"])
def test_it_can_be_written_to_here(said: Said, place: str) -> None:
    assert said(f"echo yes > {place}/x; cat {place}/x") == "yes\n"
    assert said(f"cat {place}/x 2>/dev/null || echo fresh") == "fresh\n"


def test_scratch_space_executes_programs(said: Said) -> None:
    """Builds and virtual environments need it; there is nothing to gain."""
    assert said("cp /bin/true /work/t; cp /bin/true /tmp/t; /work/t && /tmp/t && echo ran") == "ran\n"


@pytest.mark.parametrize("name", rootfs.PROC_MASKED_FILES)
def test_masked_files_of_proc_are_empty(said: Said, name: str) -> None:
    assert said(f"test ! -e /proc/{name} || timeout 5 head -c 1 /proc/{name} | wc -c").strip() in {"", "0"}


@pytest.mark.parametrize("name", rootfs.PROC_READ_ONLY)
def test_read_only_parts_of_proc(said: Said, name: str) -> None:
    files = f"find /proc/{name} -type f | head -40"
    assert said(f"test -e /proc/{name} || exit 0; for f in $({files}); do (: >> $f) 2>/dev/null && echo $f; done; true") == ""


def test_proc_shows_only_the_cells_own_processes(said: Said) -> None:
    assert len([name for name in said("ls /proc").split() if name.isdigit()]) == 2  # sh, ls; process 1 is hidden


@pytest.mark.parametrize(
    ("script", "answer"),
    [
        ("head -c 3 /dev/zero | od -An -tx1", " 00 00 00\n"),
        ("head -c 5 /dev/urandom | wc -c", "5\n"),
        ("echo gone > /dev/null; cat /dev/null", ""),
        ("echo x 2>/dev/null > /dev/full || echo full", "full\n"),
        ("readlink /dev/fd /dev/stdin /dev/stdout /dev/stderr", "/proc/self/fd\nfd/0\nfd/1\nfd/2\n"),
        ("echo by name > /dev/stdout", "by name\n"),
        ("cat <&0", ""),
        ("stat -c %F /dev/stdin /proc/self/fd/0 | sort -u", "symbolic link\n"),
    ],
)
def test_devices_work(said: Said, script: str, answer: str) -> None:
    assert said(script) == answer


def test_programs_can_count_processors_and_read_the_machine(said: Said) -> None:
    assert said("nproc --all").strip() == str(os.cpu_count())
    assert said("head -1 /proc/meminfo").startswith("MemTotal:")
    assert said("head -1 /proc/cpuinfo").startswith("processor")
    assert said("find /sys -type f").split() in (["/" + rootfs.CPU_LIST], [])


def python(said: Said, program: str) -> str:
    if not os.path.exists("/usr/bin/python3"):
        pytest.skip("there is no /usr/bin/python3 here to try")
    return said(f"/usr/bin/python3 -c '{program}'")


def test_python_runs(said: Said) -> None:
    program = "import ssl, json, multiprocessing as m; print(ssl.create_default_context().verify_mode.name, m.Queue().empty())"
    assert python(said, program) == "CERT_REQUIRED True\n"


def test_threads_and_pools_run(said: Said) -> None:
    """clone3 is answered with ENOSYS, and the C library falls back."""
    program = "from concurrent.futures import *\nwith ThreadPoolExecutor(2) as threads, ProcessPoolExecutor(2) as processes:\n"
    program += "    print([sum(pool.map(abs, range(9))) for pool in (threads, processes)])"
    assert python(said, program) == "[36, 36]\n"


@pytest.mark.parametrize("place", ["missing", "link"])
def test_where_nothing_can_be_mounted_is_said(backend: LinuxBackend, plain: CellSpec, tmp_path: Path, place: str) -> None:
    link = next(str(path) for path in sorted(Path("/usr/bin").iterdir()) if path.is_symlink())
    target, why = {"missing": ("/bin/no-such-place", "none can be made"), "link": (link, "is a symbolic link in the cell")}[place]
    tmp_path.chmod(0o755)
    filesystem = Filesystem(mounts=(Mount(source=str(tmp_path), target=target, mode="ro"),))
    document = structs.replace(plain, authority=structs.replace(plain.authority, filesystem=filesystem))
    with pytest.raises(HostBackendError, match=f"at {target}: .*{why}"):
        backend.create(document, key=os.urandom(8).hex())
