"""What is refused before anything is created: members of a document that nothing here would enforce, each named.

A document that passed `parse_execution_cell` is well-formed; whether this host, this backend and this version can keep what it declares is
decided here. Nothing that is declared is ignored.
"""

import re
from collections.abc import Callable

from cellos.core.documents import CellSpec
from cellos.errors import ArgvTooLarge, ExportError, Unenforceable
from cellos.ports import ArtifactStore, CellBackend, Refusal

LARGEST_GRACE_SECONDS = 120
LARGEST_ARGV_BYTES = 512 * 1024
"""argv is part of an event, and an event has at most 1 MiB."""

RESERVED_NAME = (
    r"PATH|HOME|TMPDIR|LD_.*|GLIBC_TUNABLES|GCONV_PATH|LOCPATH|BASH_ENV|BASH_FUNC_.*|ENV|IFS|SHELLOPTS|PS4|PYTHON[A-Z].*|PERL5?(LIB|OPT|DB)"
    r"|RUBY(LIB|OPT)|NODE_(OPTIONS|PATH)|JAVA_TOOL_OPTIONS|CELLOS_.*"
)
"""Variables that decide what is executed. A secret of that name would let whoever supplies its value choose the program."""

Check = Callable[[CellSpec], Refusal | None]


def admit(spec: CellSpec, backend: CellBackend, artifacts: ArtifactStore | None) -> None:
    """Let a spec pass, or raise for the first thing that is in its way: Unenforceable, ArgvTooLarge, ExportError."""
    for check in CHECKS:
        refusal = check(spec)
        if refusal is not None:
            raise Unenforceable(field=refusal.field, why=refusal.why)
    for refusal in backend.refusals(spec):
        raise Unenforceable(field=refusal.field, why=refusal.why)
    if spec.run is not None:
        encoded = sum(len(argument.encode()) + 1 for argument in spec.run.argv)
        if encoded > LARGEST_ARGV_BYTES:
            raise ArgvTooLarge(encoded_bytes=encoded, limit_bytes=LARGEST_ARGV_BYTES)
    for artifact in (spec.export and spec.export.artifacts) or ():
        if artifacts is None:
            raise ExportError(f'export requested for artifact "{artifact.name}" but no export sink is configured; set CELLOS_EXPORT_DIR')


def _identity(spec: CellSpec) -> Refusal | None:
    return Refusal(field="spec.identity", why="no identity broker is built yet") if spec.identity is not None else None


def _derivation(spec: CellSpec) -> Refusal | None:
    if spec.authority.authority_derivation is None:
        return None
    return Refusal(field="spec.authority.authorityDerivation", why="derivation tokens are not verified yet")


def _export_targets(spec: CellSpec) -> Refusal | None:
    if not (spec.export and spec.export.targets):
        return None
    return Refusal(
        field="spec.export.targets", why="http and s3 targets are not built yet; without targets, artifacts go to CELLOS_EXPORT_DIR"
    )


def _secret_names(spec: CellSpec) -> Refusal | None:
    for position, key in enumerate(spec.authority.secret_refs or ()):
        if re.fullmatch(RESERVED_NAME, key):
            why = f"a secret named {key} would decide what the command executes; choose another name"
            return Refusal(field=f"spec.authority.secretRefs[{position}]", why=why)
    return None


def _secret_delivery(spec: CellSpec) -> Refusal | None:
    """The contract's default, runtimeLeasedBroker, needs a broker with leases; its words are kept."""
    if spec.run is None or not spec.authority.secret_refs or spec.run.secret_delivery == "env":
        return None
    if spec.run.secret_delivery == "runtimeLeasedBroker":
        why = "runtime leased broker prepare: secret broker: runtimeLeasedBroker is not supported by this secret broker"
    else:
        why = f"{spec.run.secret_delivery} is not built yet"
    return Refusal(field="spec.run.secretDelivery", why=f'{why}; set it to "env"')


def _grace(spec: CellSpec) -> Refusal | None:
    grace = spec.run and spec.run.limits and spec.run.limits.graceful_shutdown_seconds
    if not grace or grace <= LARGEST_GRACE_SECONDS:
        return None
    return Refusal(field="spec.run.limits.gracefulShutdownSeconds", why=f"it is at most {LARGEST_GRACE_SECONDS}")


CHECKS: tuple[Check, ...] = (_identity, _derivation, _export_targets, _secret_names, _secret_delivery, _grace)
