"""`cellos describe formation|cell|node NAME`: what it is, how it stands, why it waits, what happened last, and what to type next."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import click
import msgspec

from cellos.cli import progress
from cellos.cli.control_plane import connected, painted, print_json, print_table, server_options
from cellos.cli.get import bytes_text, complete_name, cores_text, free_text, named_node, node_state
from cellos.cli.timeline import visible
from cellos.core.formation.views import place_of
from cellos.errors import ServerError

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

    from cellos.client.answers import Entry, Record
    from cellos.client.server import Server
    from cellos.core.formation.views import FormationView, MemberView

EVENTS_SHOWN = 8
_PAGE = 1000
_HEAD = ("MEMBER", "PHASE", "TRY", "NODE", "TIME", "NOTE")

as_json_option = click.option("--json", "as_json", is_flag=True, help="What the server has, as JSON.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def describe() -> None:
    """Say all about one thing: how it stands, why it waits, and what to type next."""


def _names(kind: str) -> Callable[[click.Context, click.Parameter, str], list[CompletionItem]]:
    """What completes names of that kind."""

    def names(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        ctx.params["kind"] = kind
        return complete_name(ctx, param, incomplete)

    return names


@describe.command(
    epilog="""\b
Examples:
  cellos describe formation demo
  cellos describe formation demo --json | jq -r '.members[] | select(.waiting) | .waiting'
"""
)
@click.argument("name", shell_complete=_names("formations"))
@as_json_option
@server_options
def formation(name: str, as_json: bool, server: str | None, token_file: str | None) -> None:
    """A formation, by its name or its id: its members as a tree, their attempts, and why they wait."""
    from cellos.core.formation.events import subjects_of

    with connected(server, token_file) as found:
        view = found.members(name)
        if as_json:
            print_json(msgspec.to_builtins(view))
            return
        events = _last_events(found, subjects_of(view.formation_id))
    now = time.time_ns()
    _heading("formation", view.label, view.status)
    _facts(
        ("", progress.summary(view, now)),
        ("id", view.formation_id),
        ("created", to_the_second(view.created_at)),
        ("ended", to_the_second(view.ended_at)),
        ("cancelling", view.cancelling),
        ("reason", view.reason if view.reason != view.cancelling else None),
    )
    _section("members")
    print_table(_HEAD, list(member_rows(view.members, now)))
    _show_events(events)
    _next(*formation_steps(view))


@describe.command(
    epilog="""\b
Examples:
  cellos describe cell demo/build            the cell of a member
  cellos describe cell CELL                  any cell, by the id that cellos get cells shows
"""
)
@click.argument("name", metavar="CELL|FORMATION/MEMBER", shell_complete=_names("cells"))
@as_json_option
@server_options
def cell(name: str, as_json: bool, server: str | None, token_file: str | None) -> None:
    """A cell: its latest run, and where it belongs to a formation, the attempts before."""
    from cellos.core.formation.runs import Attempt, run_subject

    with connected(server, token_file) as found:
        place = tuple(name.split("/", 1)) if "/" in name else place_of(name)
        view, member, events = None, None, []
        if place is not None:
            view = found.members(place[0])
            member = view.member(place[1])
            if member is None:
                raise ServerError(f"formation {view.label} has no member {place[1]}; see: cellos describe formation {view.label}")
            if member.attempt:
                events = _last_events(found, run_subject(Attempt(view.formation_id, member.id, member.attempt)))
        record = _record(found, name if member is None else member.cell_id, required=member is None)
    if as_json:
        print_json({"cell": record, "member": None if member is None else msgspec.to_builtins(member)})
        return
    now = time.time_ns()
    state = str(record.get("status") or record.get("state")) if record is not None else "has not begun"
    _heading("cell", str(record["id"]) if record is not None else name, state)
    if record is not None:
        _facts(
            ("run", record.get("run_id")),
            ("spec", record.get("spec_id")),
            ("started", to_the_second(record.get("started_at"))),
            ("destroyed", to_the_second(record.get("destroyed_at"))),
            ("outcome", record.get("outcome")),
            ("exit code", record.get("exit_code")),
            ("signature", record.get("signature")),
        )
    if view is not None and member is not None:
        _facts(("formation", f"{view.label} {view.status}"), ("pool", member.pool))
        _section("member")
        print_table(_HEAD, list(member_rows([member], now)))
    _show_events(events)
    target = f"{view.label}/{member.id}" if view is not None and member is not None else name
    follow = "" if record is not None and record.get("state") == "destroyed" else " -f"
    _next(f"cellos logs {target}{follow}", *([f"cellos describe formation {view.label}"] if view is not None else []))


@describe.command(
    epilog="""\b
Examples:
  cellos describe node worker-1
"""
)
@click.argument("name", shell_complete=_names("nodes"))
@as_json_option
@server_options
def node(name: str, as_json: bool, server: str | None, token_file: str | None) -> None:
    """A node: what it can enforce, and what there is room for."""
    with connected(server, token_file) as found:
        record = named_node(found.nodes().get("nodes") or [], name)
    if as_json:
        print_json(record)
        return
    _heading("node", name, node_state(record))
    _facts(*node_facts(record))
    _next("cellos get nodes", "cellos get cells --state running")


def member_rows(members: Sequence[MemberView], now_ns: int) -> Iterator[list[str]]:
    """A row for each member, as a tree; where it was tried more than once, one for each attempt below it."""
    for prefix, member in progress.tree(members):
        row = progress.row(member, now_ns)
        notes = [each for each in (row.note, _conditions(member)) if each]
        yield [prefix + row.member, row.phase, row.attempt, row.node, row.time, "; ".join(notes)]
        if len(member.attempts) > 1:
            for attempt in member.attempts:
                run = f"run {attempt.run_id}" if attempt.run_id else ""
                text = ", ".join(each for each in (progress.attempt_text(attempt), run) if each)
                yield [f"{' ' * len(prefix)}  attempt {attempt.attempt}", attempt.state, "", "", "", text]


def _conditions(member: MemberView) -> str:
    """What its document says of when it runs, and whether it matters."""
    parts = [f"after {', '.join(member.after)}"] if member.after else []
    if not member.critical:
        parts.append("not critical")
    return ", ".join(parts)


def formation_steps(view: FormationView) -> list[str]:
    """Commands that tell more, the likeliest first."""
    failed = [member for member in view.members if member.phase == "failed" and member.run_id is not None]
    if view.has_ended:
        steps = [f"cellos logs {view.label}/{member.id}" for member in failed[:1]]
        return [*steps, f"cellos events --formation {view.label}"]
    running = [member for member in view.members if member.phase == "running"]
    steps = [f"cellos logs {view.label}/{member.id} -f" for member in running[:1]]
    if view.members and all(member.phase is None for member in view.members):
        return [f"cellos get formation {view.label}"]
    return [f"cellos wait formation {view.label}", *steps]


def node_facts(record: Record) -> Iterator[tuple[str, object]]:
    yield "life", record.get("life")
    yield "process", f"{record.get('pid')} on {record.get('host')}"
    yield "pool", record.get("pool")
    yield "can enforce", ", ".join(map(str, record.get("classes") or ()))
    yield "slots free", f"{free_text(record, 'slots')}, runs {record.get('runs')}"
    yield "memory free", free_text(record, "memory", bytes_text)
    yield "cpu free", free_text(record, "cpu", cores_text)
    yield "started", to_the_second(record.get("startedAt"))
    yield "renewed", to_the_second(record.get("renewedAt"))
    yield "version", record.get("version")


def to_the_second(moment: object) -> str | None:
    """`2026-11-21T14:03:12.123456789+00:00` is `2026-11-21 14:03:12 UTC`."""
    if not isinstance(moment, str):
        return None
    return f"{moment[:19].replace('T', ' ')} UTC" if moment.endswith(("Z", "+00:00")) else moment


def _record(server: Server, cell_id: str, *, required: bool) -> Record | None:
    from cellos.errors import ServerProblem

    try:
        return server.cell(cell_id)
    except ServerProblem as error:
        if error.status == 404 and not required:
            return None
        if error.status == 404:
            raise ServerError(f"there is no cell {cell_id}; list them: cellos get cells") from error
        raise


def _last_events(server: Server, subject: str) -> list[Entry]:
    found: list[Entry] = []
    since = 0
    while page := server.events(since=since, limit=_PAGE, subject=subject).events:
        found = [*found, *page][-EVENTS_SHOWN:]
        since = page[-1].seq
        if len(page) < _PAGE:
            break
    return found


def _show_events(events: Sequence[Entry]) -> None:
    from cellos.cli.follow import text_line

    if events:
        _section("last events")
        for entry in events:
            click.echo(f"  {text_line(entry)}")


def _heading(kind: str, name: str, state: str) -> None:
    click.echo(f"{kind} {click.style(visible(name), bold=True)}  {painted(state, visible(state))}")


def _facts(*facts: tuple[str, object]) -> None:
    for label, value in facts:
        if value is not None and value != "":
            click.echo(f"  {label:11} {visible(str(value))}" if label else f"  {value}")


def _section(title: str) -> None:
    click.echo(f"\n{title}")


def _next(*commands: str) -> None:
    click.echo(f"\nNext:  {'   or   '.join(visible(command) for command in commands)}")
