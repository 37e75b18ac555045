"""The second listener, for whoever runs the server: /healthz, /readyz, /metrics. Without token, so it has an address of its own."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Receive, Scope, Send

from cellos.core.problem import method_not_allowed, no_route
from cellos.server.replies import Reply, json_reply, problem_reply
from cellos.server.state import ServerState

_TEXT = ((b"content-type", b"text/plain; version=0.0.4; charset=utf-8"),)


def create_admin_app(state: ServerState) -> ASGIApp:
    """The ASGI application."""
    registry = CollectorRegistry()
    registry.register(_Metrics(state))

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _answer(state, registry, scope)(scope, receive, send)

    return app


def _answer(state: ServerState, registry: CollectorRegistry, scope: Scope) -> Reply:
    path = scope["path"]
    if path not in {"/healthz", "/readyz", "/metrics"}:
        return problem_reply(no_route(path))
    if scope["method"] not in {"GET", "HEAD"}:
        return problem_reply(method_not_allowed(scope["method"], path), headers=((b"allow", b"GET,HEAD"),))
    if path == "/healthz":
        return json_reply(b'{"status":"ok"}')
    if path == "/metrics":
        return Reply(generate_latest(registry), headers=_TEXT)
    ready, body = readiness(state)
    return json_reply(msgspec.json.encode(body), status=200 if ready else 503)


def readiness(state: ServerState) -> tuple[bool, dict[str, object]]:
    """Whether the lists are up to date and the log can be reached, and what else there is to say."""
    ready = state.phase == "live"
    body: dict[str, object] = {"status": "ready" if ready else "not ready", "log": state.phase, "cursor": state.cursor}
    if state.skip_replay:
        body["replay"] = "skipped: the lists know only what happened since the start"
    return ready, body


class _Metrics(Collector):
    """What the state knows, when it is asked for: nothing is counted twice."""

    def __init__(self, state: ServerState) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state
        projection, hub = state.projection, state.hub
        events = CounterMetricFamily("cellos_events", "events read from the log since the projection was begun", labels=["outcome"])
        for outcome in ("applied", "ignored", "rejected"):
            events.add_metric([outcome], getattr(projection, outcome))
        yield events
        records = GaugeMetricFamily("cellos_records", "records of the projection", labels=["kind"])
        for kind, number in projection.counts().items():
            records.add_metric([kind], number)
        yield records
        yield GaugeMetricFamily("cellos_cursor", "sequence of the last event applied", value=state.cursor)
        yield GaugeMetricFamily("cellos_log_connected", "whether events can come", value=state.phase in {"live", "replaying"})
        yield GaugeMetricFamily("cellos_ready", "whether the lists are up to date", value=state.phase == "live")
        yield CounterMetricFamily("cellos_rebuilds", "how often the log was read anew", value=state.rebuilds)
        yield GaugeMetricFamily("cellos_websocket_clients", "clients of /ws/events", value=hub.clients)
        yield CounterMetricFamily("cellos_websocket_frames", "events sent to clients", value=hub.delivered)
        yield CounterMetricFamily("cellos_websocket_slow", "clients closed because they were slow", value=hub.slow)
