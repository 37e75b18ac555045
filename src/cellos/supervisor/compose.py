"""Putting a run together: configuration and a document in, a finished run out.

`open_host` makes what all runs of a process share (state directory, backend, the operator's files) and ends what dead supervisors left.
`execute` does one run: authority, policies, admission, record, sinks, `run_cell`, and what stays afterwards. A node, whose events go
another way, puts the same parts together: `open_stores`, `admit`, `make_emitter`, `make_deps`.
"""

import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import msgspec

from cellos.core import ids
from cellos.core.documents import Artifact, CellSpec, ExecutionCell, canonical_spec_hash
from cellos.core.events import Draft, RunIdentity
from cellos.core.evidence.chain import NONCE_BYTES, Chain
from cellos.core.observations import command_output
from cellos.errors import ConfigError, EventSinkError
from cellos.eventlog.spool import Spool, keep_only, read_lines, require_room
from cellos.ports import ArtifactStore, CellBackend, EventSink, Listener, Output, SecretBroker
from cellos.supervisor import admission, records, trust
from cellos.supervisor.config import BACKENDS, SETTINGS_ONLY, Config, Fallback, refuse_fallbacks
from cellos.supervisor.emitter import Emitter, Signer
from cellos.supervisor.records import Ending, RunRecord
from cellos.supervisor.report import Reporting
from cellos.supervisor.run import TERMINATED, CellOutcome, Deps, Recorder, Session, Stores, run_cell
from cellos.supervisor.sinks import Sinks, Unacknowledged, open_sinks
from cellos.supervisor.state import StateDirectory, open_state_directory
from cellos.supervisor.trust import Grant, Rejected, Trust

if TYPE_CHECKING:
    from cellos.artifacts.targets import Targets
    from cellos.sandbox.launcher import Launcher

COMMAND_PATH = "/usr/bin:/bin:/usr/local/bin"
STUB_WARNING = "CELLOS_CELL_BACKEND=stub: nothing is isolated, the command runs as an ordinary process of this host"


class Host(msgspec.Struct, kw_only=True):
    """What the runs of one process share. `notices` are events of no run that the next run's sinks get first."""

    config: Config
    state: StateDirectory
    backend: CellBackend
    trust: Trust
    signer: Signer | None
    warn: Callable[[str], None]
    notices: list[Draft]


def open_host(
    config: Config,
    launcher: "Launcher | None",
    warn: Callable[[str], None],
    *,
    state: StateDirectory | None = None,
    lost: str = records.LOST,
) -> Host:
    """Find the state directory, make the backend, read the operator's files, end the runs of dead supervisors.

    `warn` gets lines for people. `lost` is the reason of a run that was left unfinished. Raises CellosError.
    """
    signer = read_signer(config)
    state = state or open_state_directory(config.environment)
    made: dict[str, CellBackend] = {}

    def backend_of(kind: str) -> CellBackend | None:
        if kind not in BACKENDS:
            return None
        if kind not in made:
            made[kind] = _make_backend(kind, launcher, config, warn)
        return made[kind]

    backend = backend_of(config.backend)
    if backend is None:
        raise ConfigError(refuse_backend(config))
    if config.backend == "stub":
        warn(STUB_WARNING)
    files = trust.load(config, time.time_ns)
    sweeper = records.Sweeper(
        backend_of=backend_of,
        now_ns=time.time_ns,
        random=os.urandom,
        signer=signer,
        redacted_fields=config.redacted_fields,
        warn=warn,
        reason=lost,
    )
    for swept in records.sweep(state.runs, sweeper):
        warn(swept.text)
    return Host(config=config, state=state, backend=backend, trust=files, signer=signer, warn=warn, notices=list(files.notices))


def refuse_backend(config: Config) -> str:
    """Why a backend runs nothing. Raises ConfigError for settings of it that are wrong."""
    if config.backend == "firecracker":
        from cellos.backends import firecracker

        firecracker.check_settings(config.environment)
    if config.backend == "gvisor":
        from cellos.backends import gvisor

        gvisor.check_settings(config.environment)
    assert config.backend in SETTINGS_ONLY
    return f"CELLOS_CELL_BACKEND={config.backend}: its settings are right, but it is not built yet; known: {', '.join(BACKENDS)}"


def read_signer(config: Config) -> Signer | None:
    """The signer that the variables ask for. Raises ConfigError."""
    if config.environment.get("CELLOS_EVENT_SIGNING", "").strip().lower() in ("", "off"):
        return None
    from cellos.core.evidence.sign import read_signing

    return read_signing(config.environment)


def make_broker(config: Config) -> SecretBroker:
    """The broker that the variables name. Raises ConfigError."""
    match config.broker:
        case "env":
            from cellos.brokers.env import EnvBroker

            return EnvBroker(config.environment)
        case "file":
            from cellos.brokers.file import FileBroker

            return FileBroker(config.environment)
        case "github-oidc":
            from cellos.brokers.github_oidc import GithubOidcBroker

            return GithubOidcBroker(config.environment)
        case "vault-approle":
            raise ConfigError(refuse_broker(config))
        case _:
            from cellos.brokers.memory import MemoryBroker

            return MemoryBroker()


def refuse_broker(config: Config) -> str:
    """Why a broker answers nothing. Raises ConfigError for settings of it that are wrong."""
    from cellos.brokers.vault import check_vault_settings

    check_vault_settings(config.environment)
    return f"CELLOS_BROKER={config.broker}: its settings are right, but it is not built yet; known: env, file, github-oidc"


def _make_backend(kind: str, launcher: "Launcher | None", config: Config, warn: Callable[[str], None]) -> CellBackend:
    from cellos.backends.settings import check_stub_settings, read_linux_settings

    if kind == "stub":
        from cellos.backends.stub import StubBackend

        # Of the variables only those of the backend that was chosen count: another one may be here to be swept.
        for warning in check_stub_settings(config.environment) if config.backend == kind else ():
            warn(warning)
        return StubBackend()
    if launcher is None:
        raise ConfigError("that takes a start with the linux backend, the default: this one has no launcher process")
    from cellos.backends.linux import LinuxBackend

    settings = read_linux_settings(config.environment)
    for warning in settings.warnings:
        warn(warning)
    return LinuxBackend(launcher=launcher, settings=settings)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run to do: a document with the digest of its bytes, and what surrounds it."""

    document: ExecutionCell
    spec_hash: str
    run_id: str | None = None
    broker: SecretBroker
    artifacts: ArtifactStore | None = None
    """Takes every artifact; None: they go where document and configuration say."""
    stdin: int | None = None
    stdout: Output = Output()
    stderr: Output = Output()
    interrupt: int | None = None
    keep_evidence: bool = False
    """The event file is the product: it stays under evidence/, named after the run."""


class Finished(msgspec.Struct, frozen=True, kw_only=True):
    """A run that was done."""

    outcome: CellOutcome
    evidence: str | None
    """Path of the run's own event file where it stays."""
    unacknowledged: Unacknowledged = Unacknowledged()

    def not_sent(self) -> str | None:
        """For people: what NATS does not have, why, where it is, and how to send it."""
        left, path = self.unacknowledged, self.evidence
        if not left.events:
            return None
        if left.waiting:
            where = f"wait in {path}; send them with: cellos spool replay {path}" if path else "are lost"
        else:
            where = f"are in {left.dead_letters}"
        return f"{left.events} events were not acknowledged by NATS ({left.error}) and {where}"


def execute(host: Host, order: Order) -> Finished:
    """Do one run. Blocks; may be called from several threads. Raises CellosError where no cell was created."""
    config, submitted = host.config, order.document
    trust.check_document(submitted.spec, config)
    granted = trust.grant(submitted, config, host.trust, host.warn)
    spec = granted.document.spec
    run = run_identity(spec, order.spec_hash, order.run_id or new_run_id())
    fallbacks: list[Fallback] = []
    with (
        open_stores(order, spec, config, fallbacks) as stores,
        open_sinks(config, run, fallbacks, record_stays=order.keep_evidence) as sinks,
    ):
        if config.strict:
            refuse_fallbacks(fallbacks)
        for fallback in fallbacks:
            host.warn(f"not followed: {fallback.text}")
        notices, host.notices = host.notices, []
        alone = _emit_alone(host, sinks, notices)
        try:
            finished = _run_recorded(host, order, admit(host, granted, run, stores), run, stores, sinks)
        except Rejected as rejection:
            try:
                alone += _emit_alone(host, sinks, [rejection.draft])
            except EventSinkError as error:  # why it was refused matters more
                host.warn(f"the refusal could not be recorded: {error}")
            raise
        finally:
            if alone:
                _settle(host, sinks, alone)
        return finished


def admit(host: Host, granted: Grant, run: RunIdentity, stores: Stores) -> Grant:
    """Hold a run against everything that may refuse it; the rate comes last, as it counts. What is granted in the end.

    Raises Rejected, with the event that says so, and other CellosErrors.
    """
    trust.check_policies(run, granted.document.spec, host.config, host.trust)
    granted = trust.bounded(granted, host.trust)
    admission.admit(granted.document.spec, host.backend)
    stores.check()
    check_output(host.config)
    require_room(host.state.spool)
    trust.count_cell(run, host.trust, lambda subject, most: _within_rate(host, subject, most))
    return granted


class _OneStore:
    """Stores of a caller who says himself where artifacts go; without a store there is nowhere."""

    def __init__(self, store: ArtifactStore | None) -> None:
        self._store = store

    def for_artifact(self, artifact: Artifact, secrets: Mapping[str, str] | None = None) -> ArtifactStore | None:
        return self._store

    def kind_for(self, artifact: Artifact) -> str:
        return self._store.kind if self._store else "local"

    def check(self) -> None:
        """He knows."""

    def __enter__(self) -> "_OneStore":
        return self

    def __exit__(self, *_: object) -> None:
        """Nothing was opened."""


def open_stores(order: Order, spec: CellSpec, config: Config, fallbacks: list[Fallback]) -> "Targets | _OneStore":
    """Where the artifacts of a run go. Use with `with`. Raises ConfigError."""
    if order.artifacts is not None or spec.export is None:
        return _OneStore(order.artifacts)
    from cellos.artifacts.targets import open_targets

    targets = open_targets(spec, config.environment)
    fallbacks += [Fallback(variable=each.variable, value=each.value, reason=each.reason) for each in targets.fallbacks]
    return targets


def _within_rate(host: Host, subject: str, most: int) -> bool:
    from cellos.supervisor.rates import HourlyLimit

    return HourlyLimit(f"{host.state.path}/rates").admit(subject, most, time.time())


def _emit_alone(host: Host, sinks: Sinks, drafts: Sequence[Draft]) -> list[str]:
    """Record and send events that no chain links. The files that they are in."""
    if not drafts:
        return []
    spool = Spool(_new_file(host, sinks, os.urandom(8).hex()))
    emitter = make_emitter(host, None, spool, sinks.outlets)
    try:
        for draft in drafts:
            emitter.emit(draft)
    except EventSinkError:
        if emitter.count:
            host.warn(f"events of no run are in {spool.path}")
        else:
            os.unlink(spool.path)
        raise
    finally:
        spool.close()
    return [spool.path]


def _settle(host: Host, sinks: Sinks, paths: Sequence[str]) -> None:
    """Remove the files of events that every sink has. Where there is no sink, they are all that there is."""
    for path in paths:
        waiting = _lines_of(path, sinks.finish().waiting)
        if not sinks.none_at_all:
            keep_only(path, waiting)
        if sinks.none_at_all or waiting:
            host.warn(f"events of no run are in {path}")


def _lines_of(path: str, waiting: Iterable[bytes]) -> list[bytes]:
    """Those of the events that still wait which are in this file: others are in their own."""
    lines = frozenset(waiting)
    return [line for line in read_lines(path) if line in lines] if lines else []


def _new_file(host: Host, sinks: Sinks, name: str) -> str:
    """Where events wait to be sent; where nobody wants them sent, they are the evidence."""
    return f"{host.state.evidence if sinks.none_at_all else host.state.spool}/{name}.jsonl"


def make_emitter(host: Host, chain: Chain | None, spool: EventSink, outlets: Sequence[EventSink]) -> Emitter:
    """What makes events final, with the host's redaction and signature."""
    return Emitter(
        chain=chain,
        spool=spool,
        sinks=outlets,
        redacted_fields=host.config.redacted_fields,
        signer=host.signer,
        now_ns=time.time_ns,
        random=os.urandom,
    )


def _run_recorded(host: Host, order: Order, granted: Grant, run: RunIdentity, stores: Stores, sinks: Sinks) -> Finished:
    """The record goes when nothing is left to do for the run: its end is in every sink, or it never began."""
    config = host.config
    key = os.urandom(8).hex()
    stays = order.keep_evidence or sinks.none_at_all
    record = RunRecord(
        key=key,
        pid=os.getpid(),
        run=records.redacted(run, config.redacted_fields),
        ttl_seconds=granted.document.spec.lifetime.ttl_seconds,
        backend=host.backend.kind,
        footprint=host.backend.footprint(key),
        spool=f"{host.state.evidence}/{run.run_id}.jsonl" if order.keep_evidence else _new_file(host, sinks, key),
        keep_spool=stays or sinks.forwards,
        jsonl=config.jsonl,
        jsonl_offset=sinks.mirror_size,
        redacted_fields=tuple(sorted(config.redacted_fields)),
    )
    held = records.hold(host.state.runs, record)
    try:
        try:
            spool = Spool(record.spool)
        except BaseException:
            held.remove()
            raise
        emitter = make_emitter(host, new_chain(run), spool, sinks.outlets)
        try:
            outcome = run_cell(granted.document, make_deps(host, order, granted, run, key, emitter, stores))
        finally:
            spooled = spool.in_place
            spool.close()
            unacknowledged = sinks.finish()
            never_began = emitter.count == 0 and emitter.lost == 0
            complete = emitter.complete and not sinks.mirror_removed
            waiting = _lines_of(record.spool, unacknowledged.waiting)
            gone = never_began or (complete and not stays and not waiting)
            if gone and spooled:
                os.unlink(record.spool)
            if never_began or complete:
                held.remove()
                if not gone and not stays:
                    keep_only(record.spool, waiting)
        fault = None
        if not spooled and (stays or not complete or unacknowledged.waiting):
            fault = f"the record {record.spool} was removed while the run went on"
        elif sinks.mirror_removed:
            fault = f"{config.jsonl} was removed while the run went on; the next start writes it again"
        elif unacknowledged.events and config.require_jetstream:
            fault = f"CELL_OS_REQUIRE_JETSTREAM is set and {unacknowledged.events} events were not acknowledged"
        if fault is not None:
            outcome = _unrecorded(outcome, fault, host)
        if not emitter.complete:
            held.rewrite(msgspec.structs.replace(record, ending=_ending(outcome, emitter)))
        return Finished(outcome=outcome, evidence=None if gone or not spooled else record.spool, unacknowledged=unacknowledged)
    finally:
        held.leave()


def _ending(outcome: CellOutcome, emitter: Emitter) -> Ending:
    """For whoever ends the record in our place: without it, he could only say that we were lost."""
    reason = outcome.reason and emitter.masked(outcome.reason)[: records.MOST_REASON]  # half of a secret would not be found any more
    status = outcome.command.exit_code if outcome.command is not None else None
    if reason is not None and status is not None and not reason.startswith("command "):
        reason = f"{reason}; the command exited with status {status}"
    return Ending(outcome=outcome.outcome, reason=reason)


def _unrecorded(outcome: CellOutcome, fault: str, host: Host) -> CellOutcome:
    """A run without its record has failed, however its command ended."""
    error = EventSinkError(fault)
    if outcome.reason is not None:  # which tells of something else
        host.warn(str(error))
        return outcome
    return msgspec.structs.replace(outcome, outcome="failed", reason=str(error))


def new_chain(run: RunIdentity) -> Chain:
    """The chain of a run that begins."""
    return Chain.first(run.run_id, run.spec_hash, os.urandom(NONCE_BYTES).hex())


def make_deps(host: Host, order: Order, granted: Grant, run: RunIdentity, key: str, emitter: Emitter, stores: Stores) -> Deps:
    """Everything that `run_cell` needs beside the document that is granted."""
    config = host.config
    return Deps(
        backend=host.backend,
        events=emitter,
        broker=order.broker,
        stores=stores,
        run=run,
        key=key,
        environment=command_environment(host.backend.kind),
        reporting=_reporting(config, order.document.spec),
        derivation=granted.derivation,
        universal_role=granted.universal_role,
        check_program=admission.program_check(config.argv0_prefixes) if config.argv0_prefixes else None,
        refuse_unbounded=config.profile == "hardened",
        open_session=_open_session,
        record_output=_recorder(config, run, emitter),
        run_timeout_ms=config.run_timeout_ms,
        stdin=order.stdin,
        stdout=order.stdout,
        stderr=order.stderr,
        interrupt=order.interrupt,
        stop_reason=lambda: TERMINATED if order.interrupt is not None and _readable(order.interrupt) else None,
        monotonic=time.monotonic,
    )


def _reporting(config: Config, spec: CellSpec) -> Reporting:
    resolve = None
    if config.resolve_egress:
        from cellos.supervisor.resolve import addresses

        resolve = addresses
    return Reporting(
        digest=canonical_spec_hash(spec),
        limits_declared=spec.run is not None and spec.run.limits is not None,
        now=lambda: ids.rfc3339(time.time_ns()),
        new_id=new_run_id,
        keyset_id=config.labels.keyset_id,
        resolver_kid=config.labels.resolver_kid,
        l7_kid=config.labels.l7_kid,
        trust_plane=config.trust_plane,
        l7_gate=config.l7_gate,
        resolve=resolve,
    )


def _open_session(listener: Listener, values: Mapping[str, str], seconds: Mapping[str, int], mode: str) -> Session:
    from cellos.supervisor.secrets import SecretSession

    return SecretSession(listener, values, ttl_seconds=seconds, mode=mode, monotonic=time.monotonic).__enter__()


def check_output(config: Config) -> None:
    """Whether what the command writes can be kept. Raises ConfigError."""
    if config.output_dir is not None:
        from cellos.supervisor.output import check_directory

        check_directory(config.output_dir)


def _recorder(config: Config, run: RunIdentity, emitter: Emitter) -> Callable[[Iterable[str]], Recorder] | None:
    if config.output_dir is None and not config.output_events:
        return None
    from cellos.supervisor.output import OutputRecorder

    def emit(stream: str, offset: int, content: dict[str, Any], truncated: bool) -> object:
        return emitter.emit(command_output(run, stream=stream, offset=offset, content=content, truncated=truncated))

    return lambda secrets: OutputRecorder(
        run.run_id,
        directory=config.output_dir,
        most_bytes=config.output_bytes,
        secrets=secrets,
        emit=emit if config.output_events else None,
    )


def _readable(descriptor: int) -> bool:
    import select

    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


def run_identity(spec: CellSpec, spec_hash: str, run_id: str) -> RunIdentity:
    """What every event of the run says about it.

    An absent tenantId or correlationId is left out, the other absent members of a correlation are null, as consumers know them.
    """
    correlation: dict[str, Any] | None = None
    if spec.correlation is not None:
        correlation = msgspec.to_builtins(spec.correlation)
        for name in ("tenantId", "correlationId"):
            if correlation[name] is None:
                del correlation[name]
    placement: dict[str, Any] | None = None
    if spec.placement is not None:
        placement = {name: value for name, value in msgspec.to_builtins(spec.placement).items() if value is not None}
    return RunIdentity(
        cell_id=spec.id,
        spec_id=spec.id,
        run_id=run_id,
        spec_hash=spec_hash,
        correlation=correlation,
        tenant_id=spec.correlation.tenant_id if spec.correlation else None,
        placement=placement,
    )


def command_environment(backend: str) -> dict[str, str]:
    """A command's environment without its secrets. Nothing of ours is inherited.

    HOME and TMPDIR name directories that exist in a cell only: on the stub they would be the host's.
    """
    environment = {"PATH": COMMAND_PATH}
    if backend == "linux":
        environment |= {"HOME": "/work", "TMPDIR": "/tmp"}
    return environment


def new_run_id() -> str:
    """A UUIDv7: run ids sort by time."""
    return ids.uuid7(time.time_ns() // 1_000_000, os.urandom(ids.UUID_RANDOM_BYTES))
