"""Putting a run together: variables and options in, a finished run out.

`read_config` turns the environment into one frozen value, once. `open_host` makes what all runs of a process share (state directory,
backend) and ends what dead supervisors left. `execute` does one run: admission, record, sinks, `run_cell`, and what stays afterwards.
"""

import os
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from cellos.artifacts.files import DirectoryStore
from cellos.core import deadline, ids
from cellos.core.documents import CellSpec, ExecutionCell
from cellos.core.events import RunIdentity
from cellos.core.evidence.chain import NONCE_BYTES, Chain
from cellos.core.evidence.redact import parse_fields
from cellos.errors import ConfigError
from cellos.eventlog.jsonl import JsonlSink
from cellos.eventlog.spool import Spool
from cellos.ports import ArtifactStore, CellBackend, EventSink, Output, SecretBroker
from cellos.supervisor import records
from cellos.supervisor.admission import admit
from cellos.supervisor.emitter import Emitter
from cellos.supervisor.records import RunRecord
from cellos.supervisor.run import CellOutcome, Deps, run_cell
from cellos.supervisor.state import StateDirectory, open_state_directory

if TYPE_CHECKING:
    from cellos.sandbox.launcher import Launcher

BACKENDS = ("linux", "stub")
NOT_BUILT_BACKENDS = ("firecracker", "gvisor")
COMMAND_PATH = "/usr/bin:/bin:/usr/local/bin"
LONGEST_RUN_ID = 256

STUB_WARNING = "CELLOS_CELL_BACKEND=stub: nothing is isolated, the command runs as an ordinary process of this host"


class Variable(msgspec.Struct, frozen=True, kw_only=True):
    """One variable of the environment, as the reference documentation lists it."""

    name: str
    default: str
    effect: str


VARIABLES = (
    Variable(name="CELLOS_CELL_BACKEND", default="linux", effect="what isolates: `linux`; `stub` isolates nothing. Never falls back"),
    Variable(name="CELLOS_RUN_ID", default="a new UUIDv7", effect="run id in events, at most 256 printable characters"),
    Variable(name="CELLOS_RUN_TIMEOUT_MS", default="none", effect="cap on the command's time, an integer above 0"),
    Variable(name="CELL_OS_JSONL_EVENTS", default="none", effect="file to which events are appended, one per line"),
    Variable(name="CELL_OS_USE_NOOP_SINK", default="off", effect="present: events need not be kept anywhere else"),
    Variable(
        name="CELLOS_REDACT_EVENT_FIELDS", default="off", effect="`defaults` (argv, path, reason) or a list of members of `data` to redact"
    ),
    Variable(name="CELLOS_EXPORT_DIR", default="none", effect="directory that artifacts are copied to, as <cell id>/<name>"),
    Variable(name="CELLOS_STATE_DIR", default="see below", effect="directory for run records, spools and evidence"),
    Variable(
        name="CELLOS_ALLOW_UNKNOWN_FIELDS",
        default="off",
        effect="`1`, `true`, `yes`, `on`: unknown members of a document are dropped, not refused",
    ),
)

_OFF = frozenset({"", "0", "false", "no", "off"})
# Each of these asks for a check or a guarantee that this version does not have. To go on without it would be to pretend.
_NOT_BUILT: tuple[tuple[str, str, frozenset[str]], ...] = (
    ("CELLOS_DEPLOYMENT_PROFILE", "the hardened profile is", frozenset({"", "portable"})),
    ("CELLOS_POLICY_PACK_PATH", "policy packs are", frozenset()),
    ("CELLOS_AUTHZ_POLICY_PATH", "authorization policies are", frozenset()),
    ("CELLOS_REQUIRE_AUTHORITY_DERIVATION", "derivation tokens are", frozenset()),
    ("CELLOS_REQUIRE_TELEMETRY_DECLARED", "telemetry is", frozenset()),
    ("CELLOS_REQUIRE_TRUST_VERIFY_KEYS", "trust keysets are", _OFF),
    ("CELLOS_EVENT_SIGNING", "event signing is", _OFF),
    ("CELL_OS_REQUIRE_JETSTREAM", "the JetStream sink is", frozenset()),
    ("CELLOS_RUN_ARGV0_ALLOW_PREFIXES", "the list of allowed programs is", frozenset({""})),
    ("CELLOS_BROKER", "this secret broker is", frozenset({"", "memory"})),
    ("CELLOS_K8S_NAMESPACE", "the namespace gate is", frozenset({""})),
)


class Config(msgspec.Struct, frozen=True, kw_only=True):
    """The environment, read once."""

    backend: str = "linux"
    run_id: str | None = None
    run_timeout_ms: int | None = None
    jsonl: str | None = None
    noop_sink: bool = False
    redacted_fields: frozenset[str] = frozenset()
    export_dir: str | None = None
    allow_unknown_fields: bool = False
    state: Mapping[str, str] = {}
    """The variables that decide where the state directory is."""


def read_config(environment: Mapping[str, str]) -> Config:
    """The configuration of a supervisor. Raises ConfigError, naming the variable."""
    for name, what, harmless in _NOT_BUILT:
        value = environment.get(name)
        if value is not None and value.strip().lower() not in harmless:
            raise ConfigError(f"{name} is set, but {what} not built yet; unset it to run without")
    timeout = environment.get("CELLOS_RUN_TIMEOUT_MS")
    return Config(
        backend=_backend_name(environment.get("CELLOS_CELL_BACKEND", "")),
        run_id=_run_id(environment.get("CELLOS_RUN_ID", "")),
        run_timeout_ms=None if timeout is None else deadline.parse_run_timeout(timeout),
        jsonl=_path("CELL_OS_JSONL_EVENTS", environment.get("CELL_OS_JSONL_EVENTS")),
        noop_sink="CELL_OS_USE_NOOP_SINK" in environment,
        redacted_fields=parse_fields(environment.get("CELLOS_REDACT_EVENT_FIELDS", "")),
        export_dir=environment.get("CELLOS_EXPORT_DIR") or None,
        allow_unknown_fields=environment.get("CELLOS_ALLOW_UNKNOWN_FIELDS", "").strip().lower() in ("1", "true", "yes", "on"),
        state={name: environment[name] for name in ("CELLOS_STATE_DIR", "XDG_STATE_HOME", "HOME") if name in environment},
    )


def _backend_name(value: str) -> str:
    if value in NOT_BUILT_BACKENDS:
        raise ConfigError(f"CELLOS_CELL_BACKEND={value} is not built yet; known: {', '.join(BACKENDS)}")
    if value and value not in BACKENDS:
        raise ConfigError(f"CELLOS_CELL_BACKEND: unknown backend {value!r}; known: {', '.join(BACKENDS)}")
    return value or "linux"


def _run_id(value: str) -> str | None:
    if len(value) > LONGEST_RUN_ID or not value.isprintable() or any(character.isspace() for character in value):
        raise ConfigError(f"CELLOS_RUN_ID: {value[:40]!r} is not a run id (at most {LONGEST_RUN_ID} printable characters, no blanks)")
    return value or None


def _path(name: str, value: str | None) -> str | None:
    if value is not None and not value.strip():
        raise ConfigError(f"{name} is set, but empty; unset it or give a path")
    return None if value is None else os.path.abspath(value)


class Host(msgspec.Struct, frozen=True, kw_only=True):
    """What the runs of one process share."""

    config: Config
    state: StateDirectory
    backend: CellBackend
    warn: Callable[[str], None]


def open_host(config: Config, launcher: "Launcher | None", warn: Callable[[str], None]) -> Host:
    """Find the state directory, make the backend, end the runs of dead supervisors. `warn` gets lines for people. Raises CellosError."""
    state = open_state_directory(config.state)
    made: dict[str, CellBackend] = {}

    def backend_of(kind: str) -> CellBackend | None:
        if kind not in BACKENDS:
            return None
        if kind not in made:
            made[kind] = _make_backend(kind, launcher)
        return made[kind]

    backend = backend_of(config.backend)
    if backend is None:
        raise ConfigError(f"unknown backend {config.backend!r}; known: {', '.join(BACKENDS)}")
    if config.backend == "stub":
        warn(STUB_WARNING)
    sweeper = records.Sweeper(backend_of=backend_of, now_ns=time.time_ns, random=os.urandom, warn=warn)
    for swept in records.sweep(state.runs, sweeper):
        warn(f"run {swept.run_id} (cell {swept.cell_id}) was left unfinished by its supervisor; its record is complete now")
    return Host(config=config, state=state, backend=backend, warn=warn)


def _make_backend(kind: str, launcher: "Launcher | None") -> CellBackend:
    if kind == "stub":
        from cellos.backends.stub import StubBackend

        return StubBackend()
    if launcher is None:
        raise ConfigError("the linux backend needs a launcher process")
    from cellos.backends.linux import LinuxBackend

    return LinuxBackend(launcher=launcher)


class Order(msgspec.Struct, frozen=True, kw_only=True):
    """One run to do: a document with the digest of its bytes, and what surrounds it."""

    document: ExecutionCell
    spec_hash: str
    run_id: str | None = None
    broker: SecretBroker
    artifacts: ArtifactStore | None = None
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


def execute(host: Host, order: Order) -> Finished:
    """Do one run. Blocks; may be called from several threads. Raises CellosError where no cell was created."""
    config, document = host.config, order.document
    admit(document.spec, host.backend, order.artifacts)
    key = os.urandom(8).hex()
    run = run_identity(document.spec, order.spec_hash, order.run_id or new_run_id())
    stays = order.keep_evidence or not (config.jsonl or config.noop_sink)
    path = f"{host.state.evidence}/{run.run_id}.jsonl" if order.keep_evidence else f"{host.state.spool}/{key}.jsonl"
    mirror = JsonlSink(config.jsonl) if config.jsonl else None
    try:
        record = RunRecord(
            key=key,
            pid=os.getpid(),
            run=run,
            ttl_seconds=document.spec.lifetime.ttl_seconds,
            backend=host.backend.kind,
            footprint=host.backend.footprint(key),
            spool=path,
            keep_spool=stays,
            jsonl=config.jsonl,
            jsonl_offset=mirror.size if mirror else 0,
        )
        held = records.hold(host.state.runs, record)
        try:
            return _run_recorded(host, order, record, mirror, held)
        finally:
            held.leave()
    finally:
        if mirror:
            mirror.close()


def _run_recorded(host: Host, order: Order, record: RunRecord, mirror: JsonlSink | None, held: records.HeldRecord) -> Finished:
    """The record goes when nothing is left to do for the run: its end is in every sink, or it never began."""
    run = record.run
    try:
        spool = Spool(record.spool)
    except BaseException:
        held.remove()
        raise
    sinks: tuple[EventSink, ...] = (mirror,) if mirror else ()
    emitter = Emitter(
        chain=Chain.first(run.run_id, run.spec_hash, os.urandom(NONCE_BYTES).hex()),
        spool=spool,
        sinks=sinks,
        redacted_fields=host.config.redacted_fields,
        now_ns=time.time_ns,
        random=os.urandom,
    )
    deps = Deps(
        backend=host.backend,
        events=emitter,
        broker=order.broker,
        artifacts=order.artifacts,
        run=run,
        key=record.key,
        environment=command_environment(host.backend.kind),
        run_timeout_ms=host.config.run_timeout_ms,
        stdin=order.stdin,
        stdout=order.stdout,
        stderr=order.stderr,
        interrupt=order.interrupt,
        monotonic=time.monotonic,
    )
    try:
        outcome = run_cell(order.document, deps)
    finally:
        spool.close()
        never_began = emitter.count == 0 and emitter.lost == 0
        if never_began or (emitter.complete and not record.keep_spool):
            os.unlink(record.spool)
        if never_began or emitter.complete:
            held.remove()
    return Finished(outcome=outcome, evidence=record.spool if record.keep_spool or not emitter.complete else None)


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


def directory_store(config: Config) -> ArtifactStore | None:
    """Where artifacts go when the document names no target."""
    return DirectoryStore(config.export_dir) if config.export_dir else None
