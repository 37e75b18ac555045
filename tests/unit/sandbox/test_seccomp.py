"""The filter is read as the kernel reads it: by a small interpreter of classic BPF (linux/filter.h), over whole tables of calls."""

from __future__ import annotations

import ctypes
import errno
import functools
import json
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from cellos.sandbox import seccomp, syscalls

HEADER = Path("/usr/include/x86_64-linux-gnu/asm/unistd_64.h")

X86_64, I386, AARCH64 = 0xC000_003E, 0x4000_0003, 0xC000_00B7
X32_BIT = 0x4000_0000
KILL, ALLOW, ERRNO = 0x8000_0000, 0x7FFF_0000, 0x0005_0000

Verdict = tuple[str, int]
"""("allow", 0), ("kill", 0) or ("errno", number)"""

PROGRAM = seccomp.program()
SOCKET, SOCKETPAIR, CLONE, IOCTL, UNSHARE, SETNS = 41, 53, 56, 16, 272, 308
SETPRIORITY, IOPRIO_SET = 141, 251
MMAP, MEMFD_CREATE, SHMGET, SETSOCKOPT, SENDTO, SENDMSG, SENDMMSG, SYNC, SYNCFS = 9, 319, 29, 54, 44, 46, 307, 162, 306
FCNTL = 72
OF_A_PROCESS = (142, 144, 203, 302, 314)
"""sched_setparam, sched_setscheduler, sched_setaffinity, prlimit64, sched_setattr"""
IOCTLS = (0x5412, 0x541C, 0x5423, 0x8940, 0x8941, 0x89A0, 0x89A1, 0x8982, 0x8983)
"""TIOCSTI, TIOCLINUX, TIOCSETD, and of sockets SIOCGIFBR, SIOCSIFBR, SIOCBRADDBR, SIOCBRDELBR, SIOCGIFVLAN, SIOCSIFVLAN"""
BY_FLAG = {
    MMAP: (3, 0x4_0000), MEMFD_CREATE: (1, 4), SHMGET: (2, 0o4000), SENDTO: (3, 1), SENDMSG: (2, 1), SENDMMSG: (3, 1),
}  # fmt: skip
"""Call to the argument, and its bit, that asks for huge pages or, of those that send, for out-of-band data."""
CHECKED = (SOCKET, SOCKETPAIR, CLONE, IOCTL, SETPRIORITY, IOPRIO_SET, SETSOCKOPT, FCNTL, *OF_A_PROCESS, *BY_FLAG)
ALLOWED = frozenset(seccomp.allowed_numbers().values())


@functools.cache
def instructions(program: bytes) -> list[tuple[int, int, int, int]]:
    return list(struct.iter_unpack("HBBI", program))


def execute(program: bytes, number: int, args: tuple[int, ...] = (), arch: int = X86_64) -> Verdict:
    """What the kernel would do. Fails on everything that the kernel's checker would refuse, too."""
    wanted = [*args, *[0] * (6 - len(args))]
    data = struct.pack("=IIQ6Q", number & 0xFFFF_FFFF, arch, 0xDEAD_BEEF, *[arg & 0xFFFF_FFFF_FFFF_FFFF for arg in wanted])
    code = instructions(program)
    accumulator, position = 0, 0
    while True:
        operation, true, false, operand = code[position]
        position += 1
        match operation:
            case 0x20:  # BPF_LD | BPF_W | BPF_ABS
                assert operand % 4 == 0
                (accumulator,) = struct.unpack_from("=I", data, operand)
            case 0x54:  # BPF_ALU | BPF_AND | BPF_K
                accumulator &= operand
            case 0x15:  # BPF_JMP | BPF_JEQ | BPF_K, and so on
                position += true if accumulator == operand else false
            case 0x25:
                position += true if accumulator > operand else false
            case 0x35:
                position += true if accumulator >= operand else false
            case 0x45:
                position += true if accumulator & operand else false
            case 0x06:  # BPF_RET | BPF_K
                return decode(operand)
            case _:
                raise AssertionError(f"unknown instruction {operation:#x}")


def decode(answer: int) -> Verdict:
    if answer & 0xFFFF_0000 == ERRNO:
        return "errno", answer & 0xFFFF
    return {ALLOW: "allow", KILL: "kill"}[answer], 0


# -- the policy, said once more and independently ---------------------------------------------------------------------------------------

ENOSYS, EPERM, EPROTONOSUPPORT, EAFNOSUPPORT, ENOPROTOOPT, EOPNOTSUPP, DONE = (
    ("errno", number)
    for number in (errno.ENOSYS, errno.EPERM, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.ENOPROTOOPT, errno.EOPNOTSUPP, 0)
)
PASS = ("allow", 0)
WHATEVER = {UNSHARE: EPERM, SETNS: EPERM, SYNC: DONE, SYNCFS: DONE}


def policy(number: int, args: tuple[int, ...] = (), arch: int = X86_64) -> Verdict:
    """What docs/explanation/isolation.md promises. The kernel takes `int` arguments from the lower half of a register."""
    if arch != X86_64:
        return "kill", 0
    lower = [arg & 0xFFFF_FFFF for arg in (*args, 0, 0, 0, 0)]
    first, second, third, *_ = lower
    if number in ALLOWED:
        return PASS
    if number == SOCKET:
        if first == 1 or (first == 16 and third == 0):  # AF_UNIX; AF_NETLINK for NETLINK_ROUTE
            return PASS
        if first in (2, 10):  # AF_INET, AF_INET6: not SOCK_RAW, not SOCK_PACKET
            if second & 0xF in (3, 10):
                return EPERM
            # SOCK_STREAM and SOCK_DGRAM, with what fits, TCP or UDP
            return PASS if second & 0xF in (1, 2) and third in (0, 6, 17) else EPROTONOSUPPORT
        return EAFNOSUPPORT
    if number == SOCKETPAIR:
        return PASS if first == 1 else EAFNOSUPPORT
    if number == CLONE:
        new = 0x0002_0000 | 0x0200_0000 | 0x0400_0000 | 0x0800_0000 | 0x1000_0000 | 0x2000_0000 | 0x4000_0000
        return EPERM if first & new else PASS
    if number == IOCTL:
        return EPERM if second in IOCTLS else PASS
    if number == FCNTL:  # F_SETLEASE, F_NOTIFY
        return EPERM if second in (1024, 1026) else PASS
    if number in BY_FLAG:
        place, bit = BY_FLAG[number]
        return PASS if not lower[place] & bit else EOPNOTSUPP if bit == 1 else EPERM
    if number == SETSOCKOPT:  # TCP_ULP of SOL_TCP, UDP_ENCAP of SOL_UDP
        return ENOPROTOOPT if (second, third) in ((6, 31), (17, 100)) else PASS
    if number in OF_A_PROCESS:
        return EPERM if first == 1 else PASS
    if number in (SETPRIORITY, IOPRIO_SET):  # one process, a group of them, all of a user: 0, 1, 2 and 1, 2, 3
        return EPERM if second == 1 or first == {SETPRIORITY: 2, IOPRIO_SET: 3}[number] else PASS
    return WHATEVER.get(number, ENOSYS)


INTERESTING = (
    0,
    1,
    2,
    3,
    5,
    6,
    10,
    16,
    17,
    40,
    31,
    100,
    1024,
    1026,
    0x5412,
    0x541C,
    0x8940,
    0x8983,
    0x0002_0000,
    0x4_0022,
    0x1000_0000,
    0x4000_0000,
    0x8_0003,
    0xFFFF_FFFF,
    1 << 32,
    (1 << 32) | 2,
)


@pytest.mark.parametrize("arch", [X86_64, I386, AARCH64], ids=["x86_64", "i386", "aarch64"])
def test_every_number_has_the_verdict_of_the_policy(arch: int) -> None:
    for number in range(501):
        for args in ((), (1,), (2, 1), (3, 0), (16, 3, 0), (0x1000_0000, 0x5412)):
            assert execute(PROGRAM, number, args, arch) == policy(number, args, arch), number


def test_x32_calls_are_unknown_calls() -> None:
    assert {execute(PROGRAM, X32_BIT | number) for number in range(501)} == {ENOSYS}


@pytest.mark.parametrize("number", [*CHECKED, UNSHARE, SETNS])
def test_checked_calls_over_all_combinations_of_telling_arguments(number: int) -> None:
    fourths = (0, 1, 0x4_0022) if number in BY_FLAG else (0,)
    for first in INTERESTING:
        for second in INTERESTING:
            for third in (0, 1, 6, 15, 17, 31, 58, 100, 132, 262, 0o4600, 1 << 32, 132 | 1 << 32, 6 | 1 << 32):
                for fourth in fourths:
                    args = (first, second, third, fourth)
                    assert execute(PROGRAM, number, args) == policy(number, args), args


WORDS = st.integers(0, (1 << 64) - 1) | st.sampled_from(INTERESTING)


@given(number=st.sampled_from(CHECKED), args=st.tuples(WORDS, WORDS, WORDS, WORDS))
@example(number=SOCKET, args=((1 << 32) | 17, 3, 0, 0))
@example(number=IOCTL, args=(0, (1 << 63) | 0x5412, 0, 0))
@example(number=SETPRIORITY, args=((1 << 32) | 2, 7, 0, 0))
@example(number=144, args=((1 << 32) | 1, 0, 0, 0))
@example(number=SETSOCKOPT, args=(3, (1 << 32) | 6, (1 << 32) | 31, 0))
@example(number=MMAP, args=(0, 0, 3, (1 << 32) | 0x4_0022))
def test_arguments_have_the_verdict_of_the_policy(number: int, args: tuple[int, int, int, int]) -> None:
    assert execute(PROGRAM, number, args) == policy(number, args)


@given(number=st.integers(0, (1 << 32) - 1), args=st.tuples(WORDS, WORDS, WORDS))
def test_any_number_has_the_verdict_of_the_policy(number: int, args: tuple[int, int, int]) -> None:
    assert execute(PROGRAM, number, args) == policy(number, args)


@given(arch=st.integers(0, (1 << 32) - 1).filter(lambda arch: arch != X86_64), number=st.integers(0, 600))
def test_any_other_architecture_is_killed(arch: int, number: int) -> None:
    assert execute(PROGRAM, number, arch=arch) == ("kill", 0)


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(0x0002_0000, id="NEWNS"),
        pytest.param(0x0200_0000, id="NEWCGROUP"),
        pytest.param(0x0400_0000, id="NEWUTS"),
        pytest.param(0x0800_0000, id="NEWIPC"),
        pytest.param(0x1000_0000, id="NEWUSER"),
        pytest.param(0x2000_0000, id="NEWPID"),
        pytest.param(0x4000_0000, id="NEWNET"),
    ],
)
def test_no_clone_opens_a_namespace(flags: int) -> None:
    thread = 0x003D_0F00  # what pthread_create asks for
    assert execute(PROGRAM, CLONE, (thread,)) == PASS
    assert execute(PROGRAM, CLONE, (thread | flags,)) == EPERM


# -- names and numbers ------------------------------------------------------------------------------------------------------------------

NEVER = """
    io_uring_setup=425 io_uring_enter=426 io_uring_register=427 bpf=321 userfaultfd=323 perf_event_open=298 keyctl=250 add_key=248
    request_key=249 ptrace=101 process_vm_readv=310 process_vm_writev=311 kcmp=312 mount=165 umount2=166 pivot_root=155 chroot=161
    open_tree=428 move_mount=429 fsopen=430 fsconfig=431 fsmount=432 fspick=433 mount_setattr=442 init_module=175 finit_module=313
    delete_module=176 kexec_load=246 kexec_file_load=320 clone3=435 open_by_handle_at=304 name_to_handle_at=303 pidfd_getfd=438
    reboot=169 swapon=167 swapoff=168 sethostname=170 setdomainname=171 iopl=172 ioperm=173 settimeofday=164 clock_settime=227
    clock_adjtime=305 adjtimex=159 acct=163 quotactl=179 syslog=103 personality=135 modify_ldt=154 vmsplice=278 fanotify_init=300
    process_madvise=440 process_mrelease=448 statmount=457 listmount=458 memfd_secret=447 lookup_dcookie=212 nfsservctl=180
    mq_open=240 mq_unlink=241 mq_notify=244 cachestat=451 futex_wake=454 futex_wait=455 futex_requeue=456 lsm_get_self_attr=459
    lsm_set_self_attr=460 lsm_list_modules=461 set_mempolicy_home_node=450 quotactl_fd=443 uselib=134 vhangup=153 move_pages=279
    mbind=237 set_mempolicy=238 migrate_pages=256 remap_file_pages=216 io_setup=206 io_submit=209 fanotify_mark=301
"""


@pytest.mark.parametrize("item", NEVER.split())
def test_what_must_never_be_allowed(item: str) -> None:
    name, number = item.split("=")
    assert execute(PROGRAM, int(number)) == ENOSYS
    assert name not in seccomp.allowed_numbers()


def test_no_call_is_listed_twice() -> None:
    listed = [*(item for text in seccomp.ALLOWED.values() for item in text.split())]
    listed += [
        f"{name}={number}"
        for table in (seccomp.CHECKED, seccomp.OF_OTHERS, seccomp.REFUSED, seccomp.DONE)
        for name, number in table.items()
    ]
    names, numbers = zip(*(item.split("=") for item in listed), strict=True)
    assert len(set(names)) == len(names)
    assert len(set(numbers)) == len(numbers)


def header_numbers() -> dict[str, int]:
    if not HEADER.exists():
        pytest.skip(f"{HEADER} is not installed (linux-libc-dev)")
    return {name: int(number) for name, number in re.findall(r"#define __NR_(\w+) (\d+)", HEADER.read_text())}


def test_every_name_has_the_number_of_the_kernel_headers() -> None:
    header = header_numbers()
    known = {**seccomp.allowed_numbers(), **seccomp.CHECKED, **seccomp.OF_OTHERS, **seccomp.REFUSED, **seccomp.DONE}
    known |= {name: int(number) for name, number in (item.split("=") for item in NEVER.split())}
    newest = max(header.values())
    wrong = {name: (number, header.get(name)) for name, number in known.items() if header.get(name) != number and number <= newest}
    assert not wrong


# -- the assembler ----------------------------------------------------------------------------------------------------------------------


def jumps(program: bytes) -> Iterator[int]:
    code = instructions(program)
    for position, (operation, true, false, _) in enumerate(code):
        if operation & 0x07 == 0x05:
            yield from (position + 1 + true, position + 1 + false)


def test_every_path_through_the_program_ends_in_a_return() -> None:
    code = instructions(PROGRAM)
    assert code[-1][0] == 0x06
    assert all(target < len(code) for target in jumps(PROGRAM))
    assert len(code) <= 4096  # BPF_MAXINSNS


LOAD: seccomp.Instruction = ("load", 0, "", "")
RETURN: seccomp.Instruction = ("return", ALLOW, "", "")


def test_assembles_jumps_up_to_255() -> None:
    far: list[seccomp.Instruction | str] = [LOAD, ("equal", 1, "end", ""), *[RETURN] * 255, "end", RETURN]
    assert instructions(seccomp.assemble(far))[1] == (0x15, 255, 0, 1)


@pytest.mark.parametrize(
    ("code", "says"),
    [
        pytest.param([LOAD, ("equal", 1, "end", ""), *[RETURN] * 256, "end", RETURN], "'end'", id="too far"),
        pytest.param([LOAD, ("equal", 1, "", "nowhere"), RETURN], "'nowhere'", id="no such label"),
        pytest.param([LOAD, "back", RETURN, ("equal", 1, "back", ""), RETURN], "'back'", id="backwards"),
        pytest.param([LOAD, "twice", RETURN, "twice", RETURN], "'twice'", id="label twice"),
    ],
)
def test_says_what_cannot_be_assembled(code: list[seccomp.Instruction | str], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        seccomp.assemble(code)


@given(denied=st.dictionaries(st.integers(0, 500), st.integers(1, 133), max_size=8), number=st.integers(0, 500))
def test_a_denying_filter_denies_these_and_nothing_else(denied: dict[int, int], number: int) -> None:
    expected = ("errno", denied[number]) if number in denied else PASS
    assert execute(seccomp.denying(denied), number) == expected


# -- the kernel -------------------------------------------------------------------------------------------------------------------------

TRY = """
import ctypes, json, sys
from cellos.sandbox import seccomp, syscalls
calls = json.loads(sys.argv[1])
syscalls.no_new_privileges()
seccomp.install(seccomp.program())
libc = ctypes.CDLL(None, use_errno=True)
answers = []
for number, *args in calls:
    ctypes.set_errno(0)
    result = libc.syscall(ctypes.c_long(number), *[ctypes.c_long(arg) for arg in args])
    answers.append(ctypes.get_errno() if result < 0 else 0)
print(json.dumps(answers))
"""


def test_the_kernel_reads_it_the_same_way() -> None:
    calls: list[tuple[int, ...]] = [(number, -1, -1, -1, -1, -1, -1) for number in (165, 425, 250, 101, 321, 435)]
    calls += [(SOCKET, 40, 1, 0), (SOCKET, 2, 3, 1), (SOCKET, 16, 3, 9), (UNSHARE, 0x1000_0000), (SETNS, 0, 0), (IOCTL, 0, 0x5412, 0)]
    calls += [(X32_BIT | 39,), (39,), (SOCKET, 1, 1, 0), (SOCKET, 2, 1, 132), (SOCKET, 2, 1, 6)]
    calls += [
        (SYNCFS, -1),
        (SENDTO, -1, 0, 0, 1, 0, 0),
        (SETSOCKOPT, -1, 6, 31, 0, 0),
        (IOCTL, -1, 0x8982, 0),
        (MMAP, 0, 4096, 3, 0x4_0022, -1, 0),
    ]
    calls += [(302, 1, 7, 0, 0), (203, 1, 0, 0), (SETPRIORITY, 0, 1, 19), (SETPRIORITY, 2, 0, 19), (IOPRIO_SET, 1, 1, 0)]
    done = subprocess.run([sys.executable, "-c", TRY, json.dumps(calls)], capture_output=True, text=True, timeout=60, check=True)
    expected = [policy(number, args) if number < X32_BIT else ENOSYS for number, *rest in calls for args in [tuple(rest)]]
    assert json.loads(done.stdout) == [number for _, number in expected]


def test_a_foreign_architecture_is_killed() -> None:
    if not ia32_works():
        pytest.skip("this kernel has no 32-bit calls (CONFIG_IA32_EMULATION)")
    child = os.fork()
    if child == 0:
        try:
            syscalls.no_new_privileges()
            seccomp.install(PROGRAM)
            ia32_getpid()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -31  # SIGSYS


def ia32_getpid() -> int:
    """`mov eax, 20; int 0x80; ret`: getpid of the 32-bit table."""
    import mmap

    code = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    code.write(b"\x53\xb8\x14\x00\x00\x00\xcd\x80\x5b\xc3")
    function = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(code)))
    return int(function())


def ia32_works() -> bool:
    child = os.fork()
    if child == 0:
        try:
            os._exit(0 if ia32_getpid() == os.getpid() else 1)
        finally:
            os._exit(1)
    return os.waitpid(child, 0)[1] == 0
