"""The HTTP and WebSocket control plane: a projection of the event log.

    state = ServerState(token="…")
    app = create_app(state)

is an ASGI application that reads and answers in process, without socket and NATS; whoever has events hands them to `state.apply`. With
`follow(state, settings)` as a task it lives from the log. docs/how-to/server.md shows both.
"""

from cellos.core.cell import CellRecord
from cellos.core.formation import FormationStatus
from cellos.core.projection import ApplyOutcome, FormationRecord
from cellos.eventlog.stream import ensure_stream
from cellos.server.app import create_app
from cellos.server.state import ServerState

__all__ = ["ApplyOutcome", "CellRecord", "FormationRecord", "FormationStatus", "ServerState", "create_app", "ensure_stream"]
