"""`cellos get cells|formations|nodes`: what the control plane knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cellos.cli.control_plane import complete, connected, print_json, print_table, server_options, wants_json
from cellos.cli.process import say
from cellos.cli.timeline import visible
from cellos.errors import ServerError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cellos.client.answers import Record
    from cellos.client.server import Server

STATES = ("pending", "running", "destroyed")
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


class Kind(NamedTuple):
    """How records of one kind are named, found and shown."""

    one: str
    many: str
    columns: dict[str, Callable[[Record], object]]
    name: Callable[[Record], object]


def free_text(record: Record, what: str, shown: Callable[[int], str] = str) -> str | None:
    """`1 of 4`. The total goes by the name of what there is of it."""
    free = record.get(f"{what}Free")
    total = next((record[name] for name in (what, f"{what}Bytes", f"{what}Micros") if name in record), None)
    return f"{shown(free)} of {shown(total)}" if isinstance(free, int) and isinstance(total, int) else None


def cores_text(micros: int) -> str:
    """Microseconds per second, as cores."""
    return f"{micros / 1_000_000:g}"


def bytes_text(number: int) -> str:
    """`1.5 GiB`."""
    value, unit = float(number), 0
    while value >= 1024 and unit < len(_UNITS) - 1:
        value, unit = value / 1024, unit + 1
    return f"{value:.3g} {_UNITS[unit]}"


def node_state(record: Record) -> str:
    """In a word."""
    if record.get("late"):
        return "late"
    if record.get("draining"):
        return "draining"
    return "ready" if record.get("eligible", True) else "not eligible"


KINDS = {
    kind.many: kind
    for kind in (
        Kind(
            "cell",
            "cells",
            {
                "ID": lambda record: record.get("id"),
                "STATE": lambda record: record.get("status", record.get("state")),
                "OUTCOME": lambda record: record.get("outcome"),
                "EXIT": lambda record: record.get("exit_code"),
                "FORMATION": lambda record: record.get("formation_id"),
                "STARTED": lambda record: _to_the_second(record.get("started_at")),
                "DESTROYED": lambda record: _to_the_second(record.get("destroyed_at")),
            },
            lambda record: record.get("id"),
        ),
        Kind(
            "formation",
            "formations",
            {
                "NAME": lambda record: record.get("name"),
                "STATUS": lambda record: record.get("status", record.get("state")),
                "MEMBERS": lambda record: _members(record.get("document")),
                "ID": lambda record: record.get("id"),
            },
            lambda record: record.get("name") or record.get("id"),
        ),
        Kind(
            "node",
            "nodes",
            {
                "NODE": lambda record: record.get("node"),
                "POOL": lambda record: record.get("pool"),
                "STATE": node_state,
                "RUNS": lambda record: record.get("runs"),
                "SLOTS FREE": lambda record: free_text(record, "slots"),
                "MEMORY FREE": lambda record: free_text(record, "memory", bytes_text),
                "CPU FREE": lambda record: free_text(record, "cpu", cores_text),
                "CLASSES": lambda record: ", ".join(map(str, record.get("classes") or ())),
                "LIFE": lambda record: record.get("life"),
            },
            lambda record: record.get("node"),
        ),
    )
}
BY_WORD = {word: kind for kind in KINDS.values() for word in (kind.one, kind.many)}


class _KindParameter(click.ParamType[str]):
    """`cells` or `cell`, `formations` or `formation`."""

    name = "kind"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind = BY_WORD.get(str(value).lower())
        if kind is None:
            self.fail(f"{value!r} is nothing that can be listed; there are {', '.join(KINDS)}", param, ctx)
        return kind.many

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in KINDS if word.startswith(incomplete)]


def complete_name(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """Names of records of the kind that stands before."""
    kind = KINDS[ctx.params.get("kind") or "formations"]
    return complete(lambda server: [str(kind.name(record)) for record in _all(server, kind)], ctx, incomplete)


@click.command(
    epilog="""\b
Examples:
  cellos get formations                      all formations
  cellos get formation demo                  one, by its name or its id
  cellos get cells --state running           cells that run now
  cellos get cells --json | jq '.[].id'
  cellos get nodes                           who runs cells, and what there is room for

A table on a terminal; JSON, as the server has it, with --json or into a pipe.
"""
)
@click.argument("kind", type=_KindParameter(), metavar="cells|formations|nodes")
@click.argument("name", required=False, shell_complete=complete_name)
@click.option("--state", type=click.Choice(STATES, case_sensitive=False), help="Cells in that state only.")
@click.option("--formation", metavar="NAME|ID", help="Cells of that formation only.")
@click.option("--limit", type=click.IntRange(min=1), metavar="N", help="At most so many.")
@click.option("--json", "as_json", is_flag=True, help="JSON: an array of records, or with NAME one record.")
@server_options
@click.pass_context
def get(
    ctx: click.Context,
    kind: str,
    name: str | None,
    state: str | None,
    formation: str | None,
    limit: int | None,
    as_json: bool,
    server: str | None,
    token_file: str | None,
) -> None:
    """Show cells, formations or nodes, or the one that is named."""
    if name is not None and (state or formation or limit):
        raise click.UsageError("--state, --formation and --limit choose from a list; one record has a NAME", ctx)
    if kind != "cells" and (state or formation):
        raise click.UsageError("--state and --formation choose cells", ctx)
    from cellos.client.answers import is_id

    with connected(server, token_file) as found:
        shown: Sequence[Record]
        if kind == "nodes":
            shown = _nodes(found, name, limit)
        elif name is not None:
            shown = [found.cell(name) if kind == "cells" else found.formation(name)]
        elif kind == "cells":
            if formation is not None and not is_id(formation):
                formation = str(found.formation(formation)["id"])
            shown = found.cells(state=state, formation=formation, limit=limit)
        else:
            shown = found.formations(limit=limit)
    if wants_json(as_json):
        print_json(shown[0] if name is not None else shown)
        return
    if not shown:
        click.echo("no nodes: nobody runs cells; start one: cellos up, or cellos-node" if kind == "nodes" else f"no {kind}", err=True)
        return
    columns = KINDS[kind].columns
    print_table(list(columns), [[_text(value(record)) for value in columns.values()] for record in shown])


def _all(server: Server, kind: Kind) -> Sequence[Record]:
    if kind.many == "nodes":
        return _nodes(server, None, None)
    return server.cells() if kind.many == "cells" else server.formations()


def _nodes(server: Server, name: str | None, limit: int | None) -> Sequence[Record]:
    """All, or the one of that name: the one that is alive, where the lease of a former life of it is still there. Raises ServerError."""
    answer = server.nodes()
    found: list[Record] = answer.get("nodes") or []
    if name is not None:
        return [named_node(found, name)]
    if not answer.get("controllers"):
        say("cellos: no controller runs, so no formation goes on; start one: cellos up, or cellos-controller")
    return found[:limit]


def named_node(nodes: Sequence[Record], name: str) -> Record:
    """Raises ServerError."""
    named = sorted((record for record in nodes if record.get("node") == name), key=lambda record: bool(record.get("late")))
    if not named:
        known = ", ".join(sorted({visible(str(record.get("node"))) for record in nodes}))
        raise ServerError(f"there is no node {name}; there {f'are: {known}' if known else 'is none at all'}")
    return named[0]


def _text(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _members(document: object) -> int | None:
    """How many members the document of a formation has."""
    members = document.get("members") if isinstance(document, dict) else None
    return len(members) if isinstance(members, list) else None


def _to_the_second(time: object) -> object:
    """`2026-11-21T14:03:12.123456789+00:00` is `2026-11-21 14:03:12`; what is no such time stays as it is."""
    return time[:19].replace("T", " ") if isinstance(time, str) and time.endswith(("Z", "+00:00")) else time
