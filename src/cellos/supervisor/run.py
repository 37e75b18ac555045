"""One cell from its creation to its end, in the order that its events report.

`run_cell` is synchronous and knows documents and ports only. The first failure is the run's reason; a step after it is skipped, teardown
never is: once a cell was created, it is destroyed and `destroyed` is emitted, last and once.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

from msgspec import Struct

from cellos.core import deadline, events, observations
from cellos.core.deadline import Deadline
from cellos.core.documents import Artifact, CellSpec, ExecutionCell, Identity, Run
from cellos.core.events import Draft, RunIdentity
from cellos.errors import CellosError, EventSinkError, ExportError, SecretBrokerError, os_error_text
from cellos.ports import (
    ArtifactStore,
    CellBackend,
    Command,
    CommandResult,
    Isolation,
    Listener,
    LiveCell,
    Output,
    Receipt,
    Residue,
    SecretBroker,
)
from cellos.supervisor import report
from cellos.supervisor.report import Reporting

TERMINATED = "supervisor_terminated"
"""Reason of a run that was asked to stop."""
LOST = "the cell's init process ended unexpectedly"
OUTPUT_LOST = "output was lost: it was not read in time"
LOST_COMMAND = f"{LOST} after the command had started"
NO_LEASES = "runtimeLeasedBroker is not supported by this secret broker; set spec.run.secretDelivery to runtimeBroker or env"


class Events(Protocol):
    """Where a run's events go (`cellos.supervisor.emitter.Emitter`)."""

    @property
    def count(self) -> int: ...
    @property
    def head(self) -> str: ...
    def emit(self, draft: Draft) -> str: ...
    def hide(self, secrets: Iterable[str]) -> None: ...


class Session(Protocol):
    """Secrets that a command fetches while it runs (`cellos.supervisor.secrets.SecretSession`)."""

    @property
    def environment(self) -> Mapping[str, str]: ...
    @property
    def fetched(self) -> frozenset[str]: ...
    def close(self) -> None: ...


class Stores(Protocol):
    """Where the artifacts of a document go (`cellos.artifacts.targets.Targets`)."""

    def for_artifact(self, artifact: Artifact, secrets: Mapping[str, str] | None = None) -> ArtifactStore | None: ...
    def kind_for(self, artifact: Artifact) -> str: ...
    def check(self) -> None: ...


class Recorder(Protocol):
    """Takes what the command writes (`cellos.supervisor.output.OutputRecorder`)."""

    def write(self, stream: str, data: bytes) -> None: ...
    def close(self) -> None: ...


class Deps(Struct, frozen=True, kw_only=True):
    """Everything a run needs that is not in its document.

    `environment` is the command's whole environment but for its secrets. `run_timeout_ms` is the operator's cap.
    """

    backend: CellBackend
    events: Events
    broker: SecretBroker
    stores: Stores
    run: RunIdentity
    key: str
    environment: Mapping[str, str]
    reporting: Reporting
    derivation: Mapping[str, Any] | None = None
    """What a verified token says of the authority: members of `started`."""
    universal_role: str | None = None
    """The role whose token is bound to no run, and was let pass."""
    check_program: Callable[[Sequence[str]], None] | None = None
    """Raises ConfigError for a program that the operator does not allow."""
    refuse_unbounded: bool = False
    open_session: Callable[[Listener, Mapping[str, str], Mapping[str, int], str], Session]
    """From a listener, values, seconds that each may be had, and the name of the delivery mode."""
    record_output: Callable[[Iterable[str]], Recorder] | None = None
    """Gets the secrets that must not show."""
    run_timeout_ms: int | None = None
    stdin: int | None = None
    stdout: Output = Output()
    stderr: Output = Output()
    interrupt: int | None = None
    stop_reason: Callable[[], str | None] = lambda: None
    """Why the run is to stop, once somebody asked for it."""
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
        _declare(cell, spec, deps)
        secrets = _resolve_secrets(spec, deps, notes)
        deps.events.hide(secrets.values())
        _start(cell, spec, deps, notes)
        if spec.run is not None:
            _run_command(cell, spec, spec.run, secrets, deps, notes)
        for artifact in (spec.export and spec.export.artifacts) or ():
            _go_on(deps, notes)
            notes.receipts.append(_deliver(cell, artifact, secrets, deps, notes.started_id))
    except CellosError as error:
        notes.fail(str(error))
    except BaseException as error:
        notes.interrupted = isinstance(error, KeyboardInterrupt)
        notes.fail(TERMINATED if notes.interrupted else f"internal error: {type(error).__name__}")
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
        interrupted=notes.interrupted,
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
        self.spawned = False
        """Whether the command was started."""
        self.command: CommandResult | None = None
        self.exit_code: int | None = None
        """As events tell it: -1 where a command has none, None where none came to its end."""
        self.timed_out: Deadline | None = None
        self.interrupted = False
        self.identity: Identity | None = None
        """The one that was materialized."""
        self.fetched: frozenset[str] | None = None
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


def _go_on(deps: Deps, notes: _Notes) -> None:
    """Unless the run was asked to stop: then there is nothing more to begin."""
    reason = deps.stop_reason()
    if reason is not None:
        notes.interrupted = True
        raise _RunError(reason)


def _declare(cell: LiveCell, spec: CellSpec, deps: Deps) -> None:
    for draft in report.declared(deps.run, spec, deps.reporting):
        deps.events.emit(draft)
    unbounded = [name for name in cell.isolation.unbounded if name in ("memory", "cpu")]
    if deps.refuse_unbounded and unbounded:
        what = " and ".join(unbounded)
        raise _RunError(f"cannot enforce spec.run.limits: nothing limits {what} on this host, and the profile is hardened")


def needs_leases(spec: CellSpec) -> bool:
    """Whether its secrets, if it has any, are to be leased, which no broker does."""
    return bool(
        spec.run is not None and spec.run.secret_delivery == "runtimeLeasedBroker" and (spec.identity or spec.authority.secret_refs)
    )


def _resolve_secrets(spec: CellSpec, deps: Deps, notes: _Notes) -> dict[str, str]:
    """The identity's credential first, then the secrets in order; nothing is fetched twice."""
    leased = needs_leases(spec)
    values: dict[str, str] = {}
    if spec.identity is not None:
        values[spec.identity.secret_ref] = _materialize(spec.identity, deps, leased=leased)
        notes.identity = spec.identity
    for key in dict.fromkeys(spec.authority.secret_refs or ()):
        if key in values:
            continue
        if leased:
            raise _RunError(f"runtime leased broker prepare: {SecretBrokerError(NO_LEASES)}")
        unresolvable = f"secret {key} unresolvable via {deps.broker.name} broker"
        try:
            value = deps.broker.resolve(key, cell_id=deps.run.cell_id)
        except SecretBrokerError as error:
            raise _RunError(f"{unresolvable}: {error}") from error
        if not value:
            raise _RunError(unresolvable)
        values[key] = value
    if spec.run is not None and spec.run.secret_delivery == "env":
        for key, value in values.items():
            if "\0" in value:
                raise _RunError(f"secret {key} from the {deps.broker.name} broker has a NUL byte, which no variable can have")
    return values


def _materialize(identity: Identity, deps: Deps, *, leased: bool) -> str:
    """The credential of an identity: what the broker gives for its audience."""
    unresolvable = f"identity {identity.secret_ref} unresolvable via {deps.broker.name} broker"
    failure: str | None = None
    value = ""
    if leased:
        prepare = f"runtime leased broker prepare {identity.audience} -> {identity.secret_ref}"
        failure = f"{prepare}: {SecretBrokerError(NO_LEASES)}"
    else:
        try:
            value = deps.broker.resolve(identity.audience, cell_id=deps.run.cell_id)
        except SecretBrokerError as error:
            failure = f"{unresolvable}: {error}"
        if not value and failure is None:
            failure = f"{unresolvable} (empty value for {identity.audience})"
    if failure is not None:
        _best_effort(deps, observations.identity_failed(deps.run, identity, operation="materialize", reason=failure))
        raise _RunError(failure)
    deps.events.emit(observations.identity_materialized(deps.run, identity))
    return value


def _start(cell: LiveCell, spec: CellSpec, deps: Deps, notes: _Notes) -> None:
    """Say that the cell is there, and what holds it."""
    isolation = cell.isolation
    notes.started_id = deps.events.emit(
        events.started(deps.run, ttl_seconds=spec.lifetime.ttl_seconds, isolation=_isolation_members(isolation), derivation=deps.derivation)
    )
    if deps.universal_role is not None:
        _best_effort(deps, observations.universal_token(deps.run, role_root=deps.universal_role))
    if isolation.security is not None:
        _best_effort(deps, report.container_security(deps.run, isolation.security))
    if isolation.own_network:
        deps.events.emit(observations.network_policy(deps.run, spec.authority.egress_rules or ()))


def _run_command(cell: LiveCell, spec: CellSpec, run: Run, secrets: Mapping[str, str], deps: Deps, notes: _Notes) -> None:
    if deps.check_program is not None:
        deps.check_program(run.argv)
    limit = deadline.choose(ttl_seconds=spec.lifetime.ttl_seconds, timeout_ms=run.timeout_ms, env_ms=deps.run_timeout_ms)
    session = None
    recorder = None
    try:
        if run.secret_delivery != "env" and secrets:
            session = _open_session(cell, spec, run, secrets, deps, notes)
        recorder = deps.record_output(secrets.values()) if deps.record_output else None
        command = Command(
            argv=run.argv,
            environment={**deps.environment, **(session.environment if session else secrets)},
            working_directory=run.working_directory,
            stdin=deps.stdin,
            stdout=deps.stdout,
            stderr=deps.stderr,
            deadline_seconds=limit.seconds,
            grace_seconds=float((run.limits and run.limits.graceful_shutdown_seconds) or 0),
            interrupt=deps.interrupt,
            on_output=recorder.write if recorder else None,
        )
        spawned = events.process_spawned(deps.run, program=run.argv[0], argc=len(run.argv))

        def on_started() -> None:
            notes.spawned = True
            deps.events.emit(spawned)

        result = notes.command = cell.run(command, on_started=on_started)
    finally:
        if session is not None:
            session.close()
            notes.fetched = session.fetched
        unrecorded = _close(recorder)
    _complete(result, spec, run, limit, cell.isolation, deps, notes)
    if unrecorded is not None:
        notes.fail(str(unrecorded))
    if notes.reason is not None:
        raise _RunError(notes.reason)


def _close(recorder: Recorder | None) -> CellosError | None:
    """Why the last of the output could not be kept. How the command ended is told first, and counts first."""
    try:
        if recorder is not None:
            recorder.close()
    except CellosError as error:
        return error
    return None


def _open_session(cell: LiveCell, spec: CellSpec, run: Run, secrets: Mapping[str, str], deps: Deps, notes: _Notes) -> Session:
    seconds = dict.fromkeys(secrets, spec.lifetime.ttl_seconds)
    if spec.identity is not None and spec.identity.ttl_seconds is not None:
        seconds[spec.identity.secret_ref] = spec.identity.ttl_seconds
    try:
        return deps.open_session(cell.listen(), secrets, seconds, run.secret_delivery)
    except (CellosError, OSError) as error:
        notes.exit_code = events.NO_EXIT_CODE
        why = os_error_text(error) if isinstance(error, OSError) else error
        raise _RunError(f"start {run.secret_delivery} secret delivery session: {why}") from error


def _complete(result: CommandResult, spec: CellSpec, run: Run, limit: Deadline, isolation: Isolation, deps: Deps, notes: _Notes) -> None:
    """Report how the command ended. That comes before a failure to report it."""
    if result.ended == "deadline":
        notes.timed_out = limit
    spawn_error = LOST_COMMAND if result.ended == "lost" and notes.spawned else _spawn_error(result, limit)
    completed = events.command_completed(
        deps.run,
        argv=run.argv,
        exit_code=result.exit_code,
        duration_ms=result.duration_ms,
        spawn_error=spawn_error,
        signal=result.signal if result.ended == "exited" else None,
        oom_killed=result.oom_killed,
        output_lost=result.output_lost,
    )
    exit_code: int = completed.data["exitCode"]
    notes.exit_code = exit_code
    try:
        if isolation.own_network:
            rules = len(spec.authority.egress_rules or ())
            deps.events.emit(observations.network_enforcement(deps.run, rule_count=rules, exit_code=exit_code, spawn_error=spawn_error))
    finally:
        try:
            deps.events.emit(completed)
        finally:
            _judge(result, spawn_error, deps, notes)


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


def _judge(result: CommandResult, spawn_error: str | None, deps: Deps, notes: _Notes) -> None:
    if result.ended == "interrupted":
        notes.interrupted = True
        notes.fail(deps.stop_reason() or TERMINATED)
    elif spawn_error == LOST_COMMAND:
        notes.fail(LOST_COMMAND)
    elif spawn_error is not None:
        notes.fail(f"command spawn: {spawn_error}")
    elif result.exit_code != 0:
        status = events.NO_EXIT_CODE if result.exit_code is None else result.exit_code
        notes.fail(f"command exited with status {status}")
    elif result.output_lost:
        notes.fail(OUTPUT_LOST)


def _deliver(cell: LiveCell, artifact: Artifact, secrets: Mapping[str, str], deps: Deps, started_id: str | None) -> Receipt:
    deps.events.emit(events.fs_touch(deps.run, source_path=artifact.path, artifact_name=artifact.name))
    store = deps.stores.for_artifact(artifact)
    try:
        store = deps.stores.for_artifact(artifact, secrets)
        if store is None:
            raise ExportError(f'export requested for artifact "{artifact.name}" but no export sink is configured')
        with cell.open_artifact(artifact.path) as source:
            receipt = store.put(deps.run.cell_id, artifact.name, source, content_type=artifact.content_type)
    except ExportError as error:
        failed = events.export_failed(
            deps.run,
            artifact_name=artifact.name,
            target_kind=deps.stores.kind_for(artifact),
            target_name=store.target if store else artifact.target,
            destination=store.destination(deps.run.cell_id, artifact.name) if store else None,
            reason=str(error),
            provenance=started_id,
        )
        _best_effort(deps, failed)  # the export's own failure is the reason that matters
        raise
    deps.events.emit(events.export_completed(deps.run, artifact_name=artifact.name, receipt=receipt, provenance=started_id))
    return receipt


def _tear_down(cell: LiveCell, spec: CellSpec, deps: Deps, notes: _Notes) -> None:
    try:
        notes.residue = cell.destroy()
    except Exception as error:  # noqa: BLE001 - whatever a backend raises here, the record gets its end
        notes.fail(f"cell destroy: {error}")
        notes.residue = (Residue(kind="unknown", detail=str(error)),)
    if notes.identity is not None:
        _best_effort(deps, observations.identity_revoked(deps.run, notes.identity, provenance=notes.started_id))
    for draft in report.closing(
        deps.run,
        spec,
        deps.reporting,
        isolation=cell.isolation,
        exit_code=notes.exit_code,
        fetched=notes.fetched,
    ):
        _best_effort(deps, draft)
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


def _best_effort(deps: Deps, draft: Draft) -> None:
    """Report something that changes nothing about the run's outcome, not even by failing."""
    try:
        deps.events.emit(draft)
    except EventSinkError:
        return


def _isolation_members(isolation: Isolation) -> dict[str, object]:
    return {
        "backend": isolation.backend,
        "enforced": list(isolation.enforced),
        "limits": dict(isolation.limits),
        "unbounded": list(isolation.unbounded),
    }
