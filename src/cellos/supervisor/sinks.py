"""Where the events of a run go beside its spool: the JSONL file, NATS, the directory for dead letters.

The order of things is that of the emitter: final bytes (redacted, linked, signed) go to the spool, and the same bytes to every outlet. So
what a dead letter holds is what the sink did not take. Publishing happens in a thread of the forwarder's own, and never holds up the run.
"""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING

from msgspec import Struct

from cellos.core.events import RunIdentity
from cellos.errors import ConfigError, EventSinkError
from cellos.eventlog.jsonl import JsonlSink
from cellos.ports import EventSink
from cellos.supervisor.config import DEFAULT_NATS_URL, Config, Fallback

if TYPE_CHECKING:
    from cellos.eventlog.dead_letters import DeadLetters
    from cellos.eventlog.forward import Forwarder, Undelivered

CONNECT_SECONDS = 5.0
"""How long a run that needs NATS waits for it."""
FINISH_SECONDS = 5.0
"""How long the end of a run waits for acknowledgements."""
SUBJECTS = ("CELLOS_EVENTS_SUBJECT_TEMPLATE", "CELLOS_TENANT_ID", "CELL_OS_EVENTS_SUBJECT")


class Unacknowledged(Struct, frozen=True, kw_only=True):
    """What NATS did not acknowledge."""

    events: int = 0
    waiting: tuple[bytes, ...] = ()
    """Those that are no dead letters either."""
    dead_letters: str | None = None
    """The directory that has the others."""
    error: str | None = None
    """The last thing that was wrong."""


class Sinks:
    """The outlets of one run. Use with `with`: what is open is closed."""

    def __init__(self, mirror: JsonlSink | None, forwarder: Forwarder | None, dead_letters: DeadLetters | None, *, wanted: bool) -> None:
        self._mirror = mirror
        self._forwarder = forwarder
        self._dead_letters = dead_letters
        self._left: Unacknowledged | None = None
        self.none_at_all = not wanted
        """Nobody said where events go: the run's own file is all that there is."""
        outlets: list[EventSink] = []
        if mirror is not None:
            outlets.append(mirror if dead_letters is None else _with_dead_letters(mirror, dead_letters))
        if forwarder is not None:
            outlets.append(forwarder)
        self.outlets = tuple(outlets)

    @property
    def forwards(self) -> bool:
        """Events are also published."""
        return self._forwarder is not None

    @property
    def mirror_size(self) -> int:
        """Bytes in the JSONL file now."""
        return self._mirror.size if self._mirror else 0

    @property
    def mirror_removed(self) -> bool:
        """The JSONL file was deleted, and what it had is gone."""
        return self._mirror is not None and self._mirror.removed

    def finish(self) -> Unacknowledged:
        """Wait for acknowledgements, and put what has none among the dead letters. Nothing can be emitted after that. Idempotent."""
        if self._left is None:
            undelivered = self._forwarder.finish(FINISH_SECONDS) if self._forwarder is not None else ()
            self._left = Unacknowledged(
                events=len(undelivered),
                waiting=tuple(event.line for event in undelivered if not self._save(event)),
                dead_letters=self._dead_letters.directory if self._dead_letters is not None else None,
                error=undelivered[-1].error if undelivered else None,
            )
        return self._left

    def _save(self, event: Undelivered) -> bool:
        if self._dead_letters is None:
            return False
        try:
            self._dead_letters.store(event.event_id, event.line, event.error)
        except EventSinkError:
            return False
        return True

    def __enter__(self) -> Sinks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for sink in (self._mirror, self._forwarder):
            if sink is not None:
                sink.close()


def open_sinks(config: Config, run: RunIdentity, fallbacks: list[Fallback], *, record_stays: bool) -> Sinks:
    """Open what the configuration names. What could not be followed is added to `fallbacks`. Raises ConfigError, EventSinkError.

    `record_stays`: the run's own file is kept anyway, so NATS is not looked for where nobody said that it is.
    """
    if config.noop_sink and config.profile == "hardened" and config.require_jetstream:
        raise ConfigError(
            "CELL_OS_USE_NOOP_SINK contradicts CELLOS_DEPLOYMENT_PROFILE=hardened, which requires JetStream; unset it, "
            "or set CELL_OS_REQUIRE_JETSTREAM=0"
        )
    if any(config.environment.get(name) for name in SUBJECTS):
        _subject(config, run)  # one that cannot be used is wrong, also where nothing is published
    dead_letters = _dead_letters(config, fallbacks)
    forwarder = None if config.noop_sink else _forwarder(config, run, fallbacks, look=not record_stays)
    try:
        mirror = JsonlSink(config.jsonl) if config.jsonl else None
    except BaseException:
        if forwarder is not None:
            forwarder.close()
        raise
    wanted = mirror is not None or forwarder is not None or config.noop_sink
    return Sinks(mirror, forwarder, dead_letters, wanted=wanted)


def _dead_letters(config: Config, fallbacks: list[Fallback]) -> DeadLetters | None:
    if config.dead_letters is None:
        return None
    from cellos.eventlog.dead_letters import DeadLetters, directory_fault

    fault = directory_fault(config.dead_letters)
    if fault is None:
        return DeadLetters(config.dead_letters)
    fallbacks.append(Fallback(variable="CELLOS_DLQ_DIR", value=config.dead_letters, reason=fault))
    return None


def _with_dead_letters(sink: EventSink, dead_letters: DeadLetters) -> EventSink:
    from cellos.eventlog.dead_letters import DlqSink

    return DlqSink(sink, dead_letters)


def _subject(config: Config, run: RunIdentity) -> str:
    from cellos.eventlog.subject import read_subject_settings, resolve_subject

    return resolve_subject(read_subject_settings(config.environment), spec_id=run.spec_id, run_id=run.run_id, tenant_id=run.tenant_id)


def _forwarder(config: Config, run: RunIdentity, fallbacks: list[Fallback], *, look: bool) -> Forwarder | None:
    """The connection to NATS, which is made while the run goes on; only a run that needs it waits."""
    from cellos.eventlog.default_server import default_server_listens

    if config.nats_url is None and not config.require_jetstream and not (look and default_server_listens()):
        if config.strict and look:
            fallbacks.append(
                Fallback(
                    variable="NATS_URL",
                    value=DEFAULT_NATS_URL,
                    reason="nothing listens there, so events are not published; CELL_OS_USE_NOOP_SINK=1 says that this is meant",
                )
            )
        return None
    from cellos.eventlog.forward import Forwarder
    from cellos.eventlog.nats_url import shown_url

    url = config.nats_url or DEFAULT_NATS_URL
    ca_file = config.environment.get("NATS_CA_FILE", "").strip() or None
    forwarder = Forwarder(url, _subject(config, run), ca_file=ca_file)
    if not (config.require_jetstream or config.strict):
        return forwarder
    failure = forwarder.connected(CONNECT_SECONDS)
    if failure is None:
        return forwarder
    forwarder.close()
    if config.require_jetstream:
        raise ConfigError(f"CELL_OS_REQUIRE_JETSTREAM is set but JetStream connect failed (broker {shown_url(url)}): {failure}")
    fallbacks.append(Fallback(variable="NATS_URL", value=shown_url(url), reason=failure))
    return None
