"""The system call filter of a cell: an allow list, assembled into classic BPF (seccomp(2), linux/seccomp.h).

A call that is not listed answers ENOSYS, as on an older kernel, so that programs fall back. A deny list would not do: io_uring performs
most calls without entering them. Calls that open new namespaces answer EPERM, and so do those that slow down or limit process 1 of the
cell, which has the command's user id, that take of the huge pages of the host, which no memory limit counts, or that load modules. Options
and flags of sockets that ways out went through, and that a cell without a network has no use for, are unknown. To write everything to disk
is done at once, as all that a cell writes lies in memory. A foreign architecture (32-bit calls) kills the process.
"""

import ctypes
import struct

from cellos.sandbox.syscalls import call

ALLOWED = {
    "files": """
        read=0 write=1 open=2 close=3 stat=4 fstat=5 lstat=6 lseek=8 pread64=17 pwrite64=18 readv=19 writev=20 preadv=295
        pwritev=296 preadv2=327 pwritev2=328 access=21 dup=32 dup2=33 dup3=292 flock=73 fsync=74 fdatasync=75
        sync_file_range=277 truncate=76 ftruncate=77 fallocate=285 getdents=78 getdents64=217 getcwd=79 chdir=80
        fchdir=81 rename=82 renameat=264 renameat2=316 mkdir=83 mkdirat=258 rmdir=84 creat=85 link=86 linkat=265 unlink=87
        unlinkat=263 symlink=88 symlinkat=266 readlink=89 readlinkat=267 chmod=90 fchmod=91 fchmodat=268 chown=92 fchown=93
        lchown=94 fchownat=260 umask=95 utime=132 utimes=235 utimensat=280 futimesat=261 mknod=133 mknodat=259 statfs=137
        fstatfs=138 openat=257 openat2=437 newfstatat=262 faccessat=269 faccessat2=439 statx=332 sendfile=40 splice=275 tee=276
        copy_file_range=326 readahead=187 fadvise64=221 close_range=436 setxattr=188 lsetxattr=189 fsetxattr=190 getxattr=191
        lgetxattr=192 fgetxattr=193 listxattr=194 llistxattr=195 flistxattr=196 removexattr=197 lremovexattr=198 fremovexattr=199
        inotify_init=253 inotify_init1=294 inotify_add_watch=254 inotify_rm_watch=255 fchmodat2=452
    """,
    "memory": """
        mprotect=10 munmap=11 brk=12 mremap=25 msync=26 mincore=27 madvise=28 mlock=149 mlock2=325 munlock=150 mlockall=151
        munlockall=152 pkey_mprotect=329 pkey_alloc=330 pkey_free=331 membarrier=324 mseal=462 map_shadow_stack=453
    """,
    "processes": """
        fork=57 vfork=58 execve=59 execveat=322 exit=60 exit_group=231 wait4=61 waitid=247 getpid=39 getppid=110 gettid=186
        getpgrp=111 getpgid=121 setpgid=109 getsid=124 setsid=112 set_tid_address=218 set_robust_list=273 get_robust_list=274
        rseq=334 arch_prctl=158 prctl=157 seccomp=317 landlock_create_ruleset=444 landlock_add_rule=445 landlock_restrict_self=446
        kill=62 tkill=200 tgkill=234 pidfd_open=434 pidfd_send_signal=424
        getrlimit=97 setrlimit=160 getrusage=98 times=100 getpriority=140 ioprio_get=252 sched_yield=24 sched_getparam=143
        sched_getscheduler=145 sched_get_priority_max=146 sched_get_priority_min=147 sched_rr_get_interval=148
        sched_getaffinity=204 sched_getattr=315 getcpu=309
    """,
    "identity": """
        getuid=102 geteuid=107 getgid=104 getegid=108 getresuid=118 getresgid=120 getgroups=115 setuid=105 setgid=106 setreuid=113
        setregid=114 setresuid=117 setresgid=119 setgroups=116 setfsuid=122 setfsgid=123 capget=125 capset=126 uname=63 sysinfo=99
    """,
    "signals": """
        rt_sigaction=13 rt_sigprocmask=14 rt_sigreturn=15 rt_sigpending=127 rt_sigtimedwait=128 rt_sigqueueinfo=129
        rt_tgsigqueueinfo=297 rt_sigsuspend=130 sigaltstack=131 pause=34 restart_syscall=219 signalfd=282 signalfd4=289
    """,
    "time": """
        time=201 gettimeofday=96 clock_gettime=228 clock_getres=229 clock_nanosleep=230 nanosleep=35 alarm=37 getitimer=36
        setitimer=38 timer_create=222 timer_settime=223 timer_gettime=224 timer_getoverrun=225 timer_delete=226 timerfd_create=283
        timerfd_settime=286 timerfd_gettime=287
    """,
    "waiting": """
        poll=7 ppoll=271 select=23 pselect6=270 epoll_create=213 epoll_create1=291 epoll_ctl=233 epoll_wait=232 epoll_pwait=281
        epoll_pwait2=441 eventfd=284 eventfd2=290 futex=202 futex_waitv=449
        getrandom=318 pipe=22 pipe2=293
    """,
    "connected sockets": """
        connect=42 accept=43 accept4=288 recvfrom=45 recvmsg=47 recvmmsg=299 shutdown=48 bind=49
        listen=50 getsockname=51 getpeername=52 getsockopt=55
    """,
    "System V IPC (of the cell's own IPC namespace)": """
        shmat=30 shmctl=31 shmdt=67 semget=64 semop=65 semtimedop=220 semctl=66 msgget=68 msgsnd=69 msgrcv=70 msgctl=71
    """,
}
"""Calls that any program may make, by topic, with their number on x86_64. What is missing is missing on purpose: io_uring_*, bpf,
userfaultfd, perf_event_open, keyctl and friends, ptrace, process_vm_*, the mount API, module and kexec calls, clone3 (its flags lie in
memory, where a filter cannot look), open_by_handle_at, pidfd_getfd, cachestat (it told what the host reads), and mq_*, as Landlock lets
nobody make such a queue."""

CHECKED = {
    "socket": 41, "socketpair": 53, "clone": 56, "ioctl": 16, "setpriority": 141, "ioprio_set": 251, "mmap": 9, "memfd_create": 319,
    "shmget": 29, "setsockopt": 54, "sendto": 44, "sendmsg": 46, "sendmmsg": 307, "fcntl": 72,
}  # fmt: skip
OF_OTHERS = {
    "sched_setparam": 142, "sched_setscheduler": 144, "sched_setaffinity": 203, "sched_setattr": 314, "prlimit64": 302,
}  # fmt: skip
"""Their first argument is a process: any but process 1."""
REFUSED = {"unshare": 272, "setns": 308}
DONE = {"sync": 162, "syncfs": 306}
"""They would make the host write what all others on it have not yet written."""

AUDIT_ARCH_X86_64 = 0xC000_003E
_KILL, _ALLOW, _DONE = 0x8000_0000, 0x7FFF_0000, 0x0005_0000
_ENOSYS, _EPERM, _EPROTONOSUPPORT, _EAFNOSUPPORT = 0x0005_0026, 0x0005_0001, 0x0005_005D, 0x0005_0061
_ENOPROTOOPT, _EOPNOTSUPP = 0x0005_005C, 0x0005_005F
_CLONE_NEW = 0x7E02_0000  # every CLONE_NEW* flag of clone(2)
_AF_UNIX, _AF_INET, _AF_INET6, _AF_NETLINK = 1, 2, 10, 16
_SOCK_TYPE_MASK, _SOCK_STREAM, _SOCK_DGRAM, _SOCK_RAW, _SOCK_PACKET, _NETLINK_ROUTE = 0xF, 1, 2, 3, 10, 0
_IPPROTO_TCP, _IPPROTO_UDP = 6, 17  # for any other, and other types, the kernel loads a module, if the host has one
_PRIO_USER, _IOPRIO_WHO_USER = 2, 3  # all processes of a user: process 1 is one of them
_PROCESS_1 = 1  # also the number of its process group and session, which nobody else can join: the command has a session of its own
_DENIED_IOCTLS = (
    0x5412, 0x541C,  # TIOCSTI, TIOCLINUX: put bytes into the terminal's input, an escape to whoever owns it
    0x5423,  # TIOCSETD loads line disciplines
    0x8940, 0x8941, 0x89A0, 0x89A1, 0x8982, 0x8983,  # SIOC[GS]IFBR, SIOCBR{ADD,DEL}BR, SIOC[GS]IFVLAN load bridge and 8021q for anybody
)  # fmt: skip
_F_SETLEASE, _F_NOTIFY = 1024, 1026  # who may read a file would hold up its writers, for 45 seconds each time
_MAP_HUGETLB, _MFD_HUGETLB, _SHM_HUGETLB = 0x4_0000, 0x4, 0o4000
_MSG_OOB = 1  # needless even for TCP; on Unix sockets the flaw that led out of other sandboxes (CVE-2025-38236)
_UDP_ENCAP, _TCP_ULP = 100, 31  # IPsec and TLS inside the kernel, for which a cell without a network has no use

_OPCODES = {"load": 0x20, "equal": 0x15, "greater": 0x25, "at_least": 0x35, "any_bit": 0x45, "mask": 0x54, "return": 0x06}
_NUMBER_OFFSET, _ARCH_OFFSET, _ARGS_OFFSET = 0, 4, 16

Instruction = tuple[str, int, str, str]
"""(operation, operand, label if true, label if false); an empty label is the next instruction."""


def allowed_numbers() -> dict[str, int]:
    """Name to number of every call that is allowed whatever its arguments."""
    return {name: int(number) for text in ALLOWED.values() for name, _, number in (item.partition("=") for item in text.split())}


def program() -> bytes:
    """The filter as an array of `struct sock_filter`."""
    code: list[Instruction | str] = [
        ("load", _ARCH_OFFSET, "", ""),
        ("equal", AUDIT_ARCH_X86_64, "", "kill"),
        ("load", _NUMBER_OFFSET, "", ""),
    ]
    # First, as the kernel remembers which calls it may always allow, and runs us for all others only.
    for name, number in CHECKED.items():
        code.append(("equal", number, name, ""))
    for index, (first, last) in enumerate(_ranges(sorted(allowed_numbers().values()))):
        # A return of its own for each range: jumps reach 255 instructions at most.
        code += [
            ("greater", last, f"range{index}", ""),
            ("at_least", first, "", f"range{index}"),
            ("return", _ALLOW, "", ""),
            f"range{index}",
        ]
    for number in OF_OTHERS.values():
        code.append(("equal", number, "of others", ""))
    for number in REFUSED.values():
        code.append(("equal", number, "eperm", ""))
    for number in DONE.values():
        code.append(("equal", number, "done", ""))
    code += [
        ("return", _ENOSYS, "", ""),
        "socket",
        ("load", _argument(0), "", ""),
        ("equal", _AF_UNIX, "allow", ""),
        ("equal", _AF_INET, "not_raw", ""),
        ("equal", _AF_INET6, "not_raw", ""),
        ("equal", _AF_NETLINK, "", "family"),
        ("load", _argument(2), "", ""),
        ("equal", _NETLINK_ROUTE, "allow", "family"),
        "not_raw",
        ("load", _argument(1), "", ""),
        ("mask", _SOCK_TYPE_MASK, "", ""),
        ("equal", _SOCK_PACKET, "eperm", ""),  # with AF_INET another name of AF_PACKET (packet(7))
        ("equal", _SOCK_RAW, "eperm", ""),
        ("equal", _SOCK_STREAM, "common", ""),
        ("equal", _SOCK_DGRAM, "", "protocol"),
        "common",
        ("load", _argument(2), "", ""),
        ("equal", 0, "allow", ""),
        ("equal", _IPPROTO_TCP, "allow", ""),
        ("equal", _IPPROTO_UDP, "allow", "protocol"),
        "socketpair",
        ("load", _argument(0), "", ""),
        ("equal", _AF_UNIX, "allow", "family"),
        "clone",
        ("load", _argument(0), "", ""),
        ("any_bit", _CLONE_NEW, "eperm", "allow"),
        "ioctl",
        ("load", _argument(1), "", ""),
        *(("equal", request, "eperm", "") for request in _DENIED_IOCTLS),
        ("return", _ALLOW, "", ""),
        "fcntl",
        ("load", _argument(1), "", ""),
        ("equal", _F_SETLEASE, "eperm", ""),
        ("equal", _F_NOTIFY, "eperm", "allow"),
        "mmap",
        ("load", _argument(3), "", ""),
        ("any_bit", _MAP_HUGETLB, "eperm", "allow"),
        "memfd_create",
        ("load", _argument(1), "", ""),
        ("any_bit", _MFD_HUGETLB, "eperm", "allow"),
        "shmget",
        ("load", _argument(2), "", ""),
        ("any_bit", _SHM_HUGETLB, "eperm", "allow"),
        "setsockopt",
        ("load", _argument(1), "", ""),
        ("equal", _IPPROTO_TCP, "of tcp", ""),
        ("equal", _IPPROTO_UDP, "", "allow"),
        ("load", _argument(2), "", ""),
        ("equal", _UDP_ENCAP, "option", "allow"),
        "of tcp",
        ("load", _argument(2), "", ""),
        ("equal", _TCP_ULP, "option", "allow"),
        "sendmsg",
        ("load", _argument(2), "", ""),
        ("any_bit", _MSG_OOB, "flag", "allow"),
        "sendto",
        "sendmmsg",
        ("load", _argument(3), "", ""),
        ("any_bit", _MSG_OOB, "flag", "allow"),
        "of others",
        ("load", _argument(0), "", ""),
        ("equal", _PROCESS_1, "eperm", "allow"),
        "setpriority",
        ("load", _argument(0), "", ""),
        ("equal", _PRIO_USER, "eperm", "whose"),
        "ioprio_set",
        ("load", _argument(0), "", ""),
        ("equal", _IOPRIO_WHO_USER, "eperm", "whose"),
        "whose",
        ("load", _argument(1), "", ""),
        ("equal", _PROCESS_1, "eperm", "allow"),
        "eperm",
        ("return", _EPERM, "", ""),
        "family",
        ("return", _EAFNOSUPPORT, "", ""),
        "protocol",
        ("return", _EPROTONOSUPPORT, "", ""),
        "option",
        ("return", _ENOPROTOOPT, "", ""),
        "flag",
        ("return", _EOPNOTSUPP, "", ""),
        "done",
        ("return", _DONE, "", ""),
        "allow",
        ("return", _ALLOW, "", ""),
        "kill",
        ("return", _KILL, "", ""),
    ]
    return assemble(code)


def denying(numbers: dict[int, int]) -> bytes:
    """A filter that answers call number -> errno and allows all others: to try what we do where a primitive is missing."""
    code: list[Instruction | str] = [("load", _NUMBER_OFFSET, "", "")]
    for number, errno in numbers.items():
        code += [("equal", number, "", f"after{number}"), ("return", 0x0005_0000 | errno, "", ""), f"after{number}"]
    return assemble([*code, ("return", _ALLOW, "", "")])


def assemble(code: list[Instruction | str]) -> bytes:
    """Instructions and labels (plain strings) to bytes. Raises ValueError for a jump that goes nowhere, back, or over 255 instructions."""
    labels: dict[str, int] = {}
    instructions: list[Instruction] = []
    for item in code:
        if isinstance(item, str):
            if item in labels:
                raise ValueError(f"label {item!r} stands twice")
            labels[item] = len(instructions)
        else:
            instructions.append(item)
    packed = b""
    for position, (operation, operand, true, false) in enumerate(instructions):
        jumps = []
        for label in (true, false):
            jump = labels.get(label, -1) - position - 1 if label else 0
            if not 0 <= jump <= 255:
                raise ValueError(f"no jump from instruction {position} to {label!r}")
            jumps.append(jump)
        packed += struct.pack("HBBI", _OPCODES[operation], *jumps, operand)
    return packed


def install(filter_program: bytes) -> None:
    """Confine the calling thread and all it starts. Needs no_new_privs or CAP_SYS_ADMIN."""
    buffer = ctypes.create_string_buffer(filter_program, len(filter_program))
    set_mode_filter = 1
    call("seccomp", set_mode_filter, 0, struct.pack("HxxxxxxQ", len(filter_program) // 8, ctypes.addressof(buffer)))


def is_available() -> bool:
    """Whether this kernel, and whoever confined us before, let us install filters."""
    get_action_avail, return_errno = 2, 0x0005_0000
    try:
        call("seccomp", get_action_avail, 0, struct.pack("I", return_errno))
    except OSError:
        return False
    return True


def _argument(index: int) -> int:
    """Offset of the lower half of an argument (little endian)."""
    return _ARGS_OFFSET + 8 * index


def _ranges(numbers: list[int]) -> list[tuple[int, int]]:
    ranges: list[tuple[int, int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], number)
        else:
            ranges.append((number, number))
    return ranges
