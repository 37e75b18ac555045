"""`cellos logs CELL | FORMATION/MEMBER`: what a cell wrote, its standard output to ours, its standard error to ours."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

import click

from cellos.cli.control_plane import complete, connected, server_options
from cellos.cli.process import say, write_all
from cellos.core.output import STREAMS, OutputEnd
from cellos.errors import ServerError, ServerProblem

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from click.shell_completion import CompletionItem

    from cellos.client.server import Server
    from cellos.core.formation.views import FormationView, MemberView

NOT_FOUND = 404
_NAMES_SHOWN = 8


def complete_target(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
    """`FORMATION/` first, then its members."""

    def names(server: Server) -> Sequence[str]:
        name, slash, _ = incomplete.partition("/")
        if not slash:
            return [f"{record.get('name') or record.get('id')}/" for record in server.formations()]
        return [f"{name}/{member.id}" for member in server.members(name).members]

    return complete(names, ctx, incomplete)


@click.command(
    epilog="""\b
Examples:
  cellos logs demo/build                 what the member build of the formation demo wrote
  cellos logs demo/build -f              and what it is yet to write, further attempts too, until it has ended
  cellos logs demo/build 2>/dev/null     its standard output only
  cellos logs demo/build --run 0199      of an earlier attempt; cellos describe formation demo lists them
  cellos logs CELL                       of any cell, by the id that cellos get cells shows

Standard output of the cell is written to standard output, its standard error to standard error; on a terminal control characters are shown
as escapes. Of each run the first mebibyte is kept, for seven days.
"""
)
@click.argument("target", metavar="CELL|FORMATION/MEMBER", shell_complete=complete_target)
@click.option("-f", "--follow", "following", is_flag=True, help="Go on until the cell, or the member, has ended.")
@click.option("--run", "run_id", metavar="RUN", help="Of that run, by its id or the beginning of it; default: the latest one.")
@click.option("--stream", type=click.Choice(STREAMS), help="That stream only.")
@server_options
def logs(target: str, following: bool, run_id: str | None, stream: str | None, server: str | None, token_file: str | None) -> None:
    """Show what a cell wrote."""
    with connected(server, token_file) as found:
        formation, slash, member_id = target.partition("/")
        if not slash:
            _of_cell(found, target, run=run_id, stream=stream, following=following)
        elif run_id is not None or not following:
            member = _member(found.members(formation), member_id)
            _show(found, member.cell_id, run=_run(member, run_id), stream=stream, following=following)
        else:
            _follow_member(found, formation, member_id, stream)


def _of_cell(server: Server, cell_id: str, *, run: str | None, stream: str | None, following: bool) -> None:
    try:
        _show(server, cell_id, run=run, stream=stream, following=following)
    except ServerProblem as error:
        if error.status != NOT_FOUND:
            raise
        try:
            view = server.members(cell_id)
        except ServerProblem:
            raise ServerError(
                f"no cell and no formation is called {cell_id}; list them: cellos get cells, cellos get formations"
            ) from error
        raise ServerError(f"{cell_id} is a formation: name one of its members, {_choices(view)}") from error


def _follow_member(server: Server, formation: str, member_id: str, stream: str | None) -> None:
    """Every attempt from the latest on, until there is no further one."""
    shown: set[str] = set()
    told = ""
    for view in server.watch(formation, note=_say):
        member = _member(view, member_id)
        if member.run_id is not None and member.run_id not in shown:
            shown.add(member.run_id)
            if member.attempt > 1:
                _say(f"attempt {member.attempt} of {view.label}/{member_id}")
            _show(server, member.cell_id, run=member.run_id, stream=stream, following=True)
            told = ""
            continue
        if member.is_over or view.has_ended or member.phase is None:
            if not shown:
                _say(f"{view.label}/{member_id} did not run: {member.reason or member.phase or view.status}")
            return
        if member.waiting and not told:
            told = member.waiting
            _say(f"{view.label}/{member_id} is {member.phase.replace('_', ' ')}: {told}")


def _show(server: Server, cell_id: str, *, run: str | None, stream: str | None, following: bool) -> None:
    """Raises ServerError, BrokenPipeError."""
    writers = {"stdout": _Writer(1), "stderr": _Writer(2)}
    sys.stdout.flush()
    for each in server.output(cell_id, run=run, stream=stream, follow=following, note=_say):
        if isinstance(each, OutputEnd):
            for writer in writers.values():
                writer.end()
            _say_end(each)
        elif each.stream in writers:
            writers[each.stream].write(each.data)


def _say_end(end: OutputEnd) -> None:
    if end.state == "gone":
        raise ServerError(f"the output of run {end.run_id} is gone: it is kept for 7 days")
    if end.state == "partial":
        _say("the output is not complete: its beginning or its end was not kept")
    if end.truncated:
        _say("the cell wrote more than is kept of a run, which is 1 MiB")


class _Writer:
    """Bytes to one of our own streams; escaped where a terminal would obey them."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._escape: Callable[..., bytes] | None = None
        if os.isatty(descriptor):
            from cellos.backends.relay import Escaper

            self._escape = Escaper()

    def write(self, data: bytes) -> None:
        write_all(self._descriptor, data if self._escape is None else self._escape(data))

    def end(self) -> None:
        """Half a character may have waited for its other half."""
        if self._escape is not None:
            write_all(self._descriptor, self._escape(b"", final=True))


def _member(view: FormationView, member_id: str) -> MemberView:
    found = view.member(member_id)
    if found is None:
        raise ServerError(f"formation {view.label} has no member {member_id}; it has {_choices(view)}")
    return found


def _run(member: MemberView, beginning: str | None) -> str | None:
    """The one run of a member that is meant. Raises ServerError."""
    if beginning is None:
        return member.run_id
    runs = [attempt.run_id for attempt in member.attempts if attempt.run_id is not None]
    found = [run for run in runs if run.startswith(beginning)]
    if len(found) == 1:
        return found[0]
    what = "the beginning of several runs" if found else "no run"
    raise ServerError(f"{beginning} is {what} of {member.id}; there are {', '.join(runs) or 'none'}")


def _choices(view: FormationView) -> str:
    names = [f"{view.label}/{member.id}" for member in view.members]
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return ", ".join(names[:_NAMES_SHOWN]) + more


def _say(text: str) -> None:
    say(f"cellos: {text}")
