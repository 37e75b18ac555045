"""Every error that CellOS raises on purpose: one tree, stable codes.

    CellosError
    ├── InvalidSpec            invalid_spec          the document breaks a rule; `path` names the member where it is known
    │   └── SpecSyntaxError    spec_syntax           not a well-formed document: bytes, JSON, shape
    ├── ArgvTooLarge           argv_too_large        the backend cannot pass that many argument bytes
    ├── Unenforceable          unenforceable         the host or backend cannot enforce `field`: refused, nothing was run
    ├── ConfigError            config                a variable or option has an unusable value
    ├── HostBackendError       host_backend          the isolating backend failed
    │   └── MissingPrimitive   missing_primitive     this host lacks `primitive`; `cure` says what to change
    ├── EventSinkError         event_sink            an event could not be recorded
    │   ├── EventRefused       event_refused         this very event will never be taken; another one may be
    │   └── ProtocolError      nats_protocol         what came is not the protocol of NATS: the connection is of no use any more
    ├── SecretBrokerError      secret_broker         a secret could not be had; never holds a value
    ├── ExportError            export_sink           an artifact could not be read or delivered
    ├── LifecycleError         lifecycle             an illegal transition was attempted
    ├── EventLogError          event_log             the event log did not do what it was asked for
    │   ├── LogUnreachable     log_unreachable       there is no connection, or nobody answers: a write was not even sent
    │   ├── OutcomeUnknown     outcome_unknown       a write was sent and not answered: settle it before it is told to anybody
    │   ├── WrongSequence      wrong_sequence        another write came first: nothing of this one was stored
    │   ├── DuplicateInBatch   duplicate_in_batch    a message id of the batch is in the log already: nothing of it was stored
    │   ├── LogTooOld          log_too_old           the NATS server lacks what the event log needs
    │   ├── NoStream           no_stream             the stream does not exist, or is not one that can be used
    │   ├── LogFull            log_full              the store has no room left
    │   ├── MessageRefused     message_refused       this very message will never be taken
    │   └── Rebuild            rebuild               what was read is not the beginning of what is there now: begin anew
    ├── FormationRejected      formation_rejected    a formation is not admitted; `problem` is what its sender reads
    ├── ServerError            server                the control plane did not do what it was asked for
    │   ├── ServerUnreachable  server_unreachable    nobody answers at its address
    │   ├── ServerProblem      server_problem        it refused; `problem` says what is wrong, in the server's words
    │   └── CursorExpired      cursor_expired        events after a cursor are gone: what was built from events is to be built anew
    ├── SnapshotError          snapshot              a snapshot of the state cannot be used: read the log instead
    │   ├── SnapshotDamaged    snapshot_damaged      not, or no longer, what was written
    │   ├── SnapshotNewer      snapshot_newer        written by a later version of this program
    │   └── SnapshotForeign    snapshot_foreign      of another log, or made with other keys
    ├── StoreError             store                 the object store did not do what it was asked for: nothing was written
    │   ├── StoreUnreachable   store_unreachable     nobody knows what came of it: a write may have been done
    │   ├── RecordDamaged      record_damaged        an object that an agent wrote is not what it wrote any more
    │   ├── LeaseLost          lease_lost            a claim is no longer ours: nothing about it may be written
    │   └── StoreUnfit         store_unfit           it does not keep a promise without which nothing may be claimed there
    ├── FleetError             fleet                 what is asked of a queue makes no sense as things stand
    └── EvidenceError          evidence              a record of events does not verify

The printed form is `<prefix>: <text>`; the prefixes are part of the contract that users grep for.
Only a `main` turns these into exit codes; nothing logs and raises.

Those from EventLogError to FleetError stand in `cellos.errors.services`, which is loaded when one of them is asked for here: each class
costs the start of a run some 30 us.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from cellos.errors.services import CursorExpired as CursorExpired
    from cellos.errors.services import DuplicateInBatch as DuplicateInBatch
    from cellos.errors.services import EventLogError as EventLogError
    from cellos.errors.services import FleetError as FleetError
    from cellos.errors.services import FormationRejected as FormationRejected
    from cellos.errors.services import LeaseLost as LeaseLost
    from cellos.errors.services import LogFull as LogFull
    from cellos.errors.services import LogTooOld as LogTooOld
    from cellos.errors.services import LogUnreachable as LogUnreachable
    from cellos.errors.services import MessageRefused as MessageRefused
    from cellos.errors.services import NoStream as NoStream
    from cellos.errors.services import OutcomeUnknown as OutcomeUnknown
    from cellos.errors.services import Rebuild as Rebuild
    from cellos.errors.services import RecordDamaged as RecordDamaged
    from cellos.errors.services import ServerError as ServerError
    from cellos.errors.services import ServerProblem as ServerProblem
    from cellos.errors.services import ServerUnreachable as ServerUnreachable
    from cellos.errors.services import SnapshotDamaged as SnapshotDamaged
    from cellos.errors.services import SnapshotError as SnapshotError
    from cellos.errors.services import SnapshotForeign as SnapshotForeign
    from cellos.errors.services import SnapshotNewer as SnapshotNewer
    from cellos.errors.services import StoreError as StoreError
    from cellos.errors.services import StoreUnfit as StoreUnfit
    from cellos.errors.services import StoreUnreachable as StoreUnreachable
    from cellos.errors.services import WrongSequence as WrongSequence


def __getattr__(name: str) -> object:
    import cellos.errors.services  # `from cellos.errors import services` would look here first

    found = vars(cellos.errors.services).get(name)
    if isinstance(found, type) and issubclass(found, CellosError):
        return found
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class CellosError(Exception):
    """Base of the tree. `code` is stable and safe to match on; `text` is the message without its prefix."""

    code = "error"
    prefix = ""

    def __init__(self, text: str) -> None:
        super().__init__(f"{self.prefix}: {text}" if self.prefix else text)
        self.text = text


class InvalidSpec(CellosError):
    """A document that breaks a rule. `path` is the dotted member path (`spec.run.argv[0]`), empty where no single one is at fault."""

    code = "invalid_spec"
    prefix = "invalid cell specification"

    def __init__(self, text: str, *, path: str = "") -> None:
        super().__init__(text)
        self.path = path


class SpecSyntaxError(InvalidSpec):
    """Not a well-formed document. `line` and `column` count from 1; both are 0 where the fault is one of shape."""

    code = "spec_syntax"
    prefix = "parse ExecutionCellDocument"

    def __init__(self, text: str, *, path: str = "", line: int = 0, column: int = 0) -> None:
        super().__init__(text, path=path)
        self.line = line
        self.column = column


class ArgvTooLarge(CellosError):
    """More argument bytes than the backend can hand over."""

    code = "argv_too_large"

    def __init__(self, *, encoded_bytes: int, limit_bytes: int) -> None:
        super().__init__(f"spec.run.argv encoded is {encoded_bytes} bytes; exceeds the backend's limit of {limit_bytes} bytes")
        self.encoded_bytes = encoded_bytes
        self.limit_bytes = limit_bytes


class Unenforceable(CellosError):
    """A declared `field` that nothing here would enforce. The cell is refused before anything is created."""

    code = "unenforceable"
    prefix = "cannot enforce"

    def __init__(self, *, field: str, why: str) -> None:
        super().__init__(f"{field}: {why}")
        self.field = field
        self.why = why


class ConfigError(CellosError):
    code = "config"


class HostBackendError(CellosError):
    code = "host_backend"
    prefix = "host backend"


class MissingPrimitive(HostBackendError):
    """This host lacks something that isolation needs."""

    code = "missing_primitive"

    def __init__(self, *, primitive: str, why: str, cure: str) -> None:
        super().__init__(f"{primitive}: {why}; {cure}")
        self.primitive = primitive
        self.why = why
        self.cure = cure


class EventSinkError(CellosError):
    code = "event_sink"
    prefix = "event sink"


class EventRefused(EventSinkError):
    """It is too large, or its id cannot be one."""

    code = "event_refused"


class ProtocolError(EventSinkError):
    code = "nats_protocol"


class SecretBrokerError(CellosError):
    code = "secret_broker"
    prefix = "secret broker"


class ExportError(CellosError):
    code = "export_sink"
    prefix = "export sink"


class LifecycleError(CellosError):
    code = "lifecycle"
    prefix = "lifecycle"


class EvidenceError(CellosError):
    code = "evidence"
    prefix = "evidence"


def os_error_text(error: OSError) -> str:
    """The operating system's words and number, as the contract prints them: `No such file or directory (os error 2)`."""
    return f"{error.strerror or error} (os error {error.errno})" if error.errno is not None else str(error)
