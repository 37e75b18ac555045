"""One cell from its creation to its end, in the order that its events report.

`run_cell` is synchronous and knows documents and ports only. The first failure is the run's reason; a step after it is skipped, teardown
never is: once a cell was created, it is destroyed and `destroyed` is emitted, last and once.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

from msgspec import Struct

from cellos.core import deadline, events
from cellos.core.deadline import Deadline
from cellos.core.documents import Artifact, CellSpec, ExecutionCell, Run
from cellos.core.events import Draft, RunIdentity
from cellos.errors import CellosError, EventSinkError, ExportError, SecretBrokerError
from cellos.ports import (
    ArtifactStore,
    CellBackend,
    Command,
    CommandResult,
    Isolation,
    LiveCell,
    Output,
    Receipt,
    Residue,
    SecretBroker,
)

TERMINATED = "supervisor_terminated"
"""Reason of a run that was asked to stop."""
LOST = "the cell's init process ended unexpectedly"


class Events(Protocol):
    """Where a run's events go (`cellos.supervisor.emitter.Emitter`)."""

    @property
    def count(self) -> int: ...
    @property
    def head(self) -> str: ...
    def emit(self, draft: Draft) -> str: ...


class Deps(Struct, frozen=True, kw_only=True):
    """Everything a run needs that is not in its document.

    `environment` is the command's whole environment but for its secrets. `run_timeout_ms` is the operator's cap.
    """

    backend: CellBackend
    events: Events
    broker: SecretBroker
    artifacts: ArtifactStore | None
    run: RunIdentity
    key: str
    environment: Mapping[str, str]
    run_timeout_ms: int | None = None
    stdin: int | None = None
    stdout: Output = Output()
    stderr: Output = Output()
    interrupt: int | None = None
    monotonic: Callable[[], float]
    """Seconds."""


class CellOutcome(Struct, frozen=True, kw_only=True):
    """How a run ended. `outcome` is succeeded or failed, `reason` the first failure."""

    run_id: str
    cell_id: str
    outcome: str
    reason: str | None
    command: CommandResult | None
    """None where no command was run to its end."""
    timed_out: Deadline | None
    interrupted: bool
    isolation: Isolation
    residue: tuple[Residue, ...]
    events: int
    head: str
    """Digest of the last event (64 hex digits)."""
    receipts: tuple[Receipt, ...]
    duration_ms: int
    """The whole run, creation and teardown included."""


def run_cell(document: ExecutionCell, deps: Deps) -> CellOutcome:
    """Run one admitted document. Blocks.

    Raises what `CellBackend.create` raises; then there is no cell and no event. Every later failure is in the outcome. An exception that is
    not ours (Ctrl-C of an embedding program, a defect) passes on after teardown.
    """
    spec = document.spec
    began = deps.monotonic()
    cell = deps.backend.create(spec, key=deps.key)
    notes = _Notes()
    try:
        secrets = _resolve_secrets(spec, deps)
        started = events.started(deps.run, ttl_seconds=spec.lifetime.ttl_seconds, isolation=_isolation_members(cell.isolation))
        notes.started_id = deps.events.emit(started)
        if spec.run is not None:
            _run_command(cell, spec, spec.run, secrets, deps, notes)
        for artifact in (spec.export and spec.export.artifacts) or ():
            notes.receipts.append(_deliver(cell, artifact, deps, notes.started_id))
    except CellosError as error:
        notes.fail(str(error))
    except BaseException as error:
        notes.fail(TERMINATED if isinstance(error, KeyboardInterrupt) else f"internal error: {type(error).__name__}")
        raise
    finally:
        _tear_down(cell, spec, deps, notes)
    return CellOutcome(
        run_id=deps.run.run_id,
        cell_id=deps.run.cell_id,
        outcome=notes.outcome,
        reason=notes.reason,
        command=notes.command,
        timed_out=notes.timed_out,
        interrupted=notes.reason == TERMINATED,
        isolation=cell.isolation,
        residue=notes.residue,
        events=deps.events.count,
        head=deps.events.head,
        receipts=tuple(notes.receipts),
        duration_ms=round((deps.monotonic() - began) * 1000),
    )


class _Notes:
    """What a run has come to so far."""

    def __init__(self) -> None:
        self.reason: str | None = None
        self.started_id: str | None = None
        self.command: CommandResult | None = None
        self.timed_out: Deadline | None = None
        self.receipts: list[Receipt] = []
        self.residue: tuple[Residue, ...] = ()

    @property
    def outcome(self) -> str:
        return "succeeded" if self.reason is None else "failed"

    def fail(self, reason: str) -> None:
        """The first failure counts."""
        if self.reason is None:
            self.reason = reason


class _RunError(CellosError):
    """A failure whose whole text is the contract's reason."""

    code = "run"


def _resolve_secrets(spec: CellSpec, deps: Deps) -> dict[str, str]:
    values = {}
    for key in dict.fromkeys(spec.authority.secret_refs or ()):
        unresolvable = f"secret {key} unresolvable via {deps.broker.name} broker"
        try:
            value = deps.broker.resolve(key, cell_id=deps.run.cell_id)
        except SecretBrokerError as error:
            raise _RunError(f"{unresolvable}: {error}") from error
        if not value:
            raise _RunError(unresolvable)
        values[key] = value
    return values


def _run_command(cell: LiveCell, spec: CellSpec, run: Run, secrets: Mapping[str, str], deps: Deps, notes: _Notes) -> None:
    limit = deadline.choose(ttl_seconds=spec.lifetime.ttl_seconds, timeout_ms=run.timeout_ms, env_ms=deps.run_timeout_ms)
    command = Command(
        argv=run.argv,
        environment={**deps.environment, **secrets},
        working_directory=run.working_directory,
        stdin=deps.stdin,
        stdout=deps.stdout,
        stderr=deps.stderr,
        deadline_seconds=limit.seconds,
        grace_seconds=float((run.limits and run.limits.graceful_shutdown_seconds) or 0),
        interrupt=deps.interrupt,
    )
    spawned = events.process_spawned(deps.run, program=run.argv[0], argc=len(run.argv))
    result = notes.command = cell.run(command, on_started=lambda: _discard(deps.events.emit(spawned)))
    if result.ended == "deadline":
        notes.timed_out = limit
    spawn_error = _spawn_error(result, limit)
    try:
        deps.events.emit(
            events.command_completed(
                deps.run,
                argv=run.argv,
                exit_code=result.exit_code,
                duration_ms=result.duration_ms,
                spawn_error=spawn_error,
                signal=result.signal if result.ended == "exited" else None,
                oom_killed=result.oom_killed,
            )
        )
    finally:  # how the command ended comes before a failure to record it
        _judge(result, spawn_error, notes)
    if notes.reason is not None:
        raise _RunError(notes.reason)


def _spawn_error(result: CommandResult, limit: Deadline) -> str | None:
    """The contract's `spawnError`: also what ended a command that did start."""
    match result.ended:
        case "deadline":
            return limit.text
        case "interrupted":
            return "supervisor terminated"
        case "lost":
            return LOST
        case _:
            return result.spawn_error


def _judge(result: CommandResult, spawn_error: str | None, notes: _Notes) -> None:
    if result.ended == "interrupted":
        notes.fail(TERMINATED)
    elif spawn_error is not None:
        notes.fail(f"command spawn: {spawn_error}")
    elif result.exit_code != 0:
        status = events.NO_EXIT_CODE if result.exit_code is None else result.exit_code
        notes.fail(f"command exited with status {status}")


def _deliver(cell: LiveCell, artifact: Artifact, deps: Deps, started_id: str | None) -> Receipt:
    deps.events.emit(events.fs_touch(deps.run, source_path=artifact.path, artifact_name=artifact.name))
    try:
        if deps.artifacts is None:
            raise ExportError(f'export requested for artifact "{artifact.name}" but no export sink is configured')
        with cell.open_artifact(artifact.path) as source:
            receipt = deps.artifacts.put(deps.run.cell_id, artifact.name, source)
    except ExportError as error:
        failed = events.export_failed(deps.run, artifact_name=artifact.name, target_kind="local", reason=str(error), provenance=started_id)
        try:
            deps.events.emit(failed)
        except EventSinkError:
            pass  # best effort: the export's own failure is the reason that matters
        raise
    deps.events.emit(events.export_completed(deps.run, artifact_name=artifact.name, receipt=receipt, provenance=started_id))
    return receipt


def _tear_down(cell: LiveCell, spec: CellSpec, deps: Deps, notes: _Notes) -> None:
    try:
        notes.residue = cell.destroy()
    except Exception as error:  # noqa: BLE001 - whatever a backend raises here, the record gets its end
        notes.fail(f"cell destroy: {error}")
        notes.residue = (Residue(kind="unknown", detail=str(error)),)
    try:
        deps.events.emit(
            events.destroyed(
                deps.run,
                ttl_seconds=spec.lifetime.ttl_seconds,
                outcome=notes.outcome,
                reason=notes.reason,
                residue_class="documented_exception" if notes.residue else "none",
                residue_exception=notes.residue,
            )
        )
    except EventSinkError as error:
        notes.fail(str(error))


def _isolation_members(isolation: Isolation) -> dict[str, object]:
    return {
        "backend": isolation.backend,
        "enforced": list(isolation.enforced),
        "limits": dict(isolation.limits),
        "unbounded": list(isolation.unbounded),
    }


def _discard(event_id: str) -> None:
    """`on_started` answers nothing."""
