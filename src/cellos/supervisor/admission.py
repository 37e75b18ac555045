"""What is refused before anything is created: members of a document that nothing here would enforce, each named.

A document that passed `parse_execution_cell` is well-formed; whether this host, this backend and this version can keep what it declares is
decided here. Nothing that is declared is ignored.
"""

import os
from collections.abc import Callable, Sequence

from cellos.core.documents import CellSpec
from cellos.errors import ArgvTooLarge, ConfigError, Unenforceable
from cellos.ports import CellBackend, Refusal

LARGEST_GRACE_SECONDS = 120
LARGEST_ARGV_BYTES = 512 * 1024
"""argv is part of an event, and an event has at most 1 MiB."""

_RESERVED_NAMES = {
    "PATH",
    "HOME",
    "TMPDIR",
    "GLIBC_TUNABLES",
    "GCONV_PATH",
    "LOCPATH",
    "BASH_ENV",
    "ENV",
    "IFS",
    "SHELLOPTS",
    "PS4",
    "PERLLIB",
    "PERLOPT",
    "PERLDB",
    "PERL5LIB",
    "PERL5OPT",
    "PERL5DB",
    "RUBYLIB",
    "RUBYOPT",
    "NODE_OPTIONS",
    "NODE_PATH",
    "JAVA_TOOL_OPTIONS",
}
_RESERVED_BEGINNINGS = ("LD_", "BASH_FUNC_", "CELLOS_")

Check = Callable[[CellSpec], Refusal | None]


def admit(spec: CellSpec, backend: CellBackend) -> None:
    """Let a spec pass, or raise for the first thing that is in its way: Unenforceable, ArgvTooLarge."""
    check(spec)
    for refusal in backend.refusals(spec):
        raise Unenforceable(field=refusal.field, why=refusal.why)
    if spec.run is not None:
        encoded = sum(len(argument.encode()) + 1 for argument in spec.run.argv)
        if encoded > LARGEST_ARGV_BYTES:
            raise ArgvTooLarge(encoded_bytes=encoded, limit_bytes=LARGEST_ARGV_BYTES)


def check(spec: CellSpec) -> None:
    """What no backend would enforce. Raises Unenforceable."""
    for find in CHECKS:
        refusal = find(spec)
        if refusal is not None:
            raise Unenforceable(field=refusal.field, why=refusal.why)


def program_check(prefixes: Sequence[str]) -> Callable[[Sequence[str]], None]:
    """What CELLOS_RUN_ARGV0_ALLOW_PREFIXES asks of a command: a program under one of the prefixes, which have no last slash.

    A path with `..` is under none: with a link before it, it leads elsewhere than it says. Other links are not looked at: nobody in a cell
    can write to /usr. The answer raises ConfigError.
    """

    def require(argv: Sequence[str]) -> None:
        program = argv[0]
        if not program.startswith("/"):
            raise ConfigError(
                f'CELLOS_RUN_ARGV0_ALLOW_PREFIXES is set but argv[0] is not an absolute path (got "{program}"); '
                "use a full path such as /usr/bin/true"
            )
        path = os.path.normpath(program)
        under = any(path == prefix or path.startswith(f"{prefix}/") for prefix in prefixes)
        if ".." in program.split("/") or not under:
            listed = "[" + ", ".join(f'"{prefix or "/"}"' for prefix in prefixes) + "]"
            raise ConfigError(f'argv[0] "{program}" is not under any allowed prefix from CELLOS_RUN_ARGV0_ALLOW_PREFIXES: {listed}')

    return require


def is_reserved(name: str) -> bool:
    """Whether a variable decides what is executed. A secret of that name would let whoever supplies its value choose the program."""
    of_python = name.startswith("PYTHON") and name[6:7].isupper()
    return of_python or name in _RESERVED_NAMES or name.startswith(_RESERVED_BEGINNINGS)


def _secret_names(spec: CellSpec) -> Refusal | None:
    for position, key in enumerate(spec.authority.secret_refs or ()):
        if is_reserved(key):
            why = f"a secret named {key} would decide what the command executes; choose another name"
            return Refusal(field=f"spec.authority.secretRefs[{position}]", why=why)
    return None


def _identity_name(spec: CellSpec) -> Refusal | None:
    if spec.identity is None or not is_reserved(spec.identity.secret_ref):
        return None
    why = f"a secret named {spec.identity.secret_ref} would decide what the command executes; choose another name"
    return Refusal(field="spec.identity.secretRef", why=why)


def _grace(spec: CellSpec) -> Refusal | None:
    grace = spec.run and spec.run.limits and spec.run.limits.graceful_shutdown_seconds
    if not grace or grace <= LARGEST_GRACE_SECONDS:
        return None
    return Refusal(field="spec.run.limits.gracefulShutdownSeconds", why=f"it is at most {LARGEST_GRACE_SECONDS}")


CHECKS: tuple[Check, ...] = (_secret_names, _identity_name, _grace)
