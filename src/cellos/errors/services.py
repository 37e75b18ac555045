"""The errors of the event log, the control plane and the object store: those that no run of a cell raises by itself.

`cellos.errors` has their tree, and hands them out as if they stood there.
"""

from __future__ import annotations

from typing import Any

from cellos.errors import CellosError


class EventLogError(CellosError):
    """`number` is JetStream's own of the error, 0 where it gave none."""

    code = "event_log"
    prefix = "event log"
    number = 0


class LogUnreachable(EventLogError):
    """Nothing was written."""

    code = "log_unreachable"


class OutcomeUnknown(EventLogError):
    """The write may be in the log, or come to it yet."""

    code = "outcome_unknown"


class WrongSequence(EventLogError):
    """Nothing was written, unless it is the answer to a repeated write whose first one got through: `EventLog.settle` tells."""

    code = "wrong_sequence"


class DuplicateInBatch(EventLogError):
    """Nothing of this batch was written; an earlier one with the same message ids was."""

    code = "duplicate_in_batch"


class LogTooOld(EventLogError):
    code = "log_too_old"


class NoStream(EventLogError):
    code = "no_stream"


class LogFull(EventLogError):
    code = "log_full"


class MessageRefused(EventLogError):
    code = "message_refused"


class Rebuild(EventLogError):
    """Not a failure: the reader's owner drops what it has and reads from the beginning. `reason` is a word for programs."""

    code = "rebuild"

    def __init__(self, text: str, *, reason: str) -> None:
        super().__init__(text)
        self.reason = reason


class FormationRejected(CellosError):
    """A formation that is not admitted. `problem` is a `cellos.core.problem.Problem`, a module above this one; `text` is its detail."""

    code = "formation_rejected"
    prefix = "formation rejected"

    def __init__(self, problem: Any) -> None:
        super().__init__(problem.detail)
        self.problem = problem


class ServerError(CellosError):
    code = "server"
    prefix = "server"


class ServerUnreachable(ServerError):
    """No answer. `sent`: the request may have arrived, and a write may have been done."""

    code = "server_unreachable"

    def __init__(self, text: str, *, sent: bool = True) -> None:
        super().__init__(text)
        self.sent = sent


class ServerProblem(ServerError):
    """An answer that is a refusal. Match on `type`: `/problems/conflict`, …; the texts are for people."""

    code = "server_problem"

    def __init__(self, problem: Any) -> None:
        super().__init__(f"{problem.title}: {problem.detail}" if problem.detail else problem.title)
        self.problem = problem
        self.type = problem.type
        self.title = problem.title
        self.status = problem.status
        self.detail = problem.detail


class CursorExpired(ServerError):
    """`oldest` is the first event that is still there, None where nobody knows; then the log was made anew, or will be."""

    code = "cursor_expired"

    def __init__(self, text: str, *, oldest: int | None) -> None:
        super().__init__(text)
        self.oldest = oldest


class SnapshotError(CellosError):
    """A snapshot of the state that cannot be used. `text` is a clause about it."""

    code = "snapshot"
    prefix = "cannot use the snapshot"


class SnapshotDamaged(SnapshotError):
    code = "snapshot_damaged"


class SnapshotNewer(SnapshotError):
    code = "snapshot_newer"


class SnapshotForeign(SnapshotError):
    code = "snapshot_foreign"


class StoreError(CellosError):
    code = "store"
    prefix = "object store"


class StoreUnreachable(StoreError):
    code = "store_unreachable"


class RecordDamaged(StoreError):
    code = "record_damaged"


class LeaseLost(StoreError):
    code = "lease_lost"


class StoreUnfit(StoreError):
    code = "store_unfit"


class FleetError(CellosError):
    code = "fleet"


for _each in list(vars().values()):
    if isinstance(_each, type) and issubclass(_each, CellosError):
        _each.__module__ = CellosError.__module__  # where people find it, and what a traceback calls it
