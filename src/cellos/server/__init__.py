"""The HTTP and WebSocket control plane: a projection of the event log."""
