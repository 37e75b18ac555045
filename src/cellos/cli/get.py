"""`cellos get cells|formations`: what the control plane knows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from cellos.cli.control_plane import complete, connected, print_json, print_table, server_options, wants_json

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cellos.client.answers import Record
    from cellos.client.server import Server

STATES = ("pending", "running", "destroyed")
_DIGITS_OF_ID = 8


class Kind(NamedTuple):
    """How records of one kind are named, found and shown."""

    one: str
    many: str
    columns: dict[str, Callable[[Record], object]]
    name: Callable[[Record], object]


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
    )
}
BY_WORD = {word: kind for kind in KINDS.values() for word in (kind.one, kind.many)}


class _KindParameter(click.ParamType[str]):
    """`cells` or `cell`, `formations` or `formation`."""

    name = "kind"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        kind = BY_WORD.get(str(value).lower())
        if kind is None:
            self.fail(f"{value!r} is nothing that can be listed; there are {' and '.join(KINDS)}", param, ctx)
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

A table on a terminal; JSON, as the server has it, with --json or into a pipe.
"""
)
@click.argument("kind", type=_KindParameter(), metavar="cells|formations")
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
    """Show cells or formations, or the one that is named."""
    if name is not None and (state or formation or limit):
        raise click.UsageError("--state, --formation and --limit choose from a list; one record has a NAME", ctx)
    if kind != "cells" and (state or formation):
        raise click.UsageError("--state and --formation choose cells", ctx)
    from cellos.client.answers import is_id

    with connected(server, token_file) as found:
        if name is not None:
            record = found.cell(name) if kind == "cells" else found.formation(name)
            shown: Sequence[Record] = [record]
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
        click.echo(f"no {kind}", err=True)
        return
    columns = KINDS[kind].columns
    print_table(list(columns), [[_text(value(record)) for value in columns.values()] for record in shown])


def _all(server: Server, kind: Kind) -> Sequence[Record]:
    return server.cells() if kind.many == "cells" else server.formations()


def _text(value: object) -> str:
    return "-" if value is None or value == "" else str(value)


def _members(document: object) -> int | None:
    """How many members the document of a formation has."""
    members = document.get("members") if isinstance(document, dict) else None
    return len(members) if isinstance(members, list) else None


def _to_the_second(time: object) -> object:
    """`2026-11-21T14:03:12.123456789+00:00` is `2026-11-21 14:03:12`; what is no such time stays as it is."""
    return time[:19].replace("T", " ") if isinstance(time, str) and time.endswith(("Z", "+00:00")) else time
