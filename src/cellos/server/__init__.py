"""The HTTP and WebSocket control plane: a projection of the event log.

    state = ServerState(token="…")
    app = create_app(state)

is an ASGI application that answers in process, without socket and NATS; whoever has events hands them to `state.apply`. `replay` reads
those of a log into it, and a `cellos.server.follow.Follower` does so for ever.
"""

from cellos.core.cell import CellRecord
from cellos.core.formation import FormationStatus
from cellos.core.projection import ApplyOutcome, FormationRecord
from cellos.eventlog.stream import ensure_stream
from cellos.server.app import create_app
from cellos.server.follow import replay
from cellos.server.state import ServerState

__all__ = [
    "ApplyOutcome",
    "CellRecord",
    "FormationRecord",
    "FormationStatus",
    "ServerState",
    "create_app",
    "ensure_stream",
    "replay",
]
