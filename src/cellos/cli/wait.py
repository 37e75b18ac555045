"""`cellos wait formation NAME`: until it has ended, or has another status; live on a terminal, a line per change in a pipe."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click
import msgspec

from cellos.cli import progress
from cellos.cli.control_plane import Duration, connected, print_json, server_options
from cellos.cli.get import complete_name
from cellos.cli.process import say
from cellos.cli.timeline import visible
from cellos.core.formation.transitions import STATUSES

if TYPE_CHECKING:
    from rich.console import RenderableType

    from cellos.client.server import Server
    from cellos.core.formation.views import FormationView

REACHED, ENDED_OTHERWISE, TIMED_OUT = 0, 1, 124
WIDTH_OF_NAME = 24
PASSED: Mapping[str, frozenset[str]] = {
    "PENDING": frozenset(STATUSES),
    "LAUNCHING": frozenset(STATUSES) - {"PENDING", "CANCELLED"},
    "RUNNING": frozenset({"COMPLETED"}),
}
"""Whoever waits for a status is told, too, where it has been passed on the way to another one."""
_NEVER = frozenset[str]()


class _Statuses(click.ParamType[frozenset[str]]):
    """`COMPLETED,FAILED`, in any case."""

    name = "statuses"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> frozenset[str]:
        if isinstance(value, frozenset):
            return value
        words = [word.strip().upper() for word in str(value).split(",")]
        for word in words:
            if word not in STATUSES:
                self.fail(f"{word!r} is no status; there are {', '.join(STATUSES)}", param, ctx)
        return frozenset(words)

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[Any]:
        from click.shell_completion import CompletionItem

        return [CompletionItem(word) for word in STATUSES if word.startswith(incomplete.upper())]


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def wait() -> None:
    """Wait until something has come about."""


@wait.command(
    epilog="""\b
Examples:
  cellos wait formation demo                             until it has ended
  cellos wait formation demo --timeout 10m
  cellos wait formation demo --for RUNNING               or has completed before anybody looked
  cellos wait formation demo --for completed,failed      either will do
  cellos wait formation demo --json | jq -r '.members[] | select(.phase == "failed") | .id'

On a terminal a live table; into a pipe a line per change; with --json one object when the waiting is over. An outage of the control plane
is waited for. Ctrl-C ends the waiting, not the formation.

Exit code: 0 when the status is reached, 1 when the formation has ended with another one, 124 when the time is over.
"""
)
@click.argument("name", shell_complete=complete_name)
@click.option("--for", "until", type=_Statuses(), default="COMPLETED", show_default=True, metavar="STATUS[,…]", help="What to wait for.")
@click.option("--timeout", "timeout_ms", type=Duration(), metavar="TIME", help="At most so long: 30s, 10m, 2h. Default: for ever.")
@click.option("--json", "as_json", is_flag=True, help="At the end, the formation with its members as JSON; nothing before.")
@server_options
@click.pass_context
def formation(
    ctx: click.Context, name: str, until: frozenset[str], timeout_ms: int | None, as_json: bool, server: str | None, token_file: str | None
) -> None:
    """Wait for a formation, by its name or its id."""
    with connected(server, token_file) as found:
        ctx.exit(wait_for(found, name, until=until, timeout_ms=timeout_ms, as_json=as_json))


def wait_for(server: Server, ident: str, *, until: Collection[str], timeout_ms: int | None, as_json: bool) -> int:
    """Until it is so, can no longer be, or the time is over: the exit code. Raises ServerError."""
    end = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
    code = None
    with _unseen() if as_json else _table() if _can_draw() else _lines() as tell:
        for view in server.watch(ident, note=lambda text: say(f"cellos: {text}")):
            tell(view)
            if is_reached(view.status, until):
                code = REACHED
            elif view.has_ended:
                code = ENDED_OTHERWISE
            elif end is not None and time.monotonic() >= end:
                code = TIMED_OUT
            if code is not None:
                break
    if as_json:
        print_json(msgspec.to_builtins(view))
    if code == TIMED_OUT:
        say(f"cellos: {view.label} is {view.status} after {progress.seconds((timeout_ms or 0) * 1_000_000)}, and goes on")
    if code != REACHED:
        say(f"cellos: see: {next_step(view)}")
    assert code is not None  # one watches for ever
    return code


def is_reached(status: str, until: Collection[str]) -> bool:
    return any(status == word or status in PASSED.get(word, _NEVER) for word in until)


def next_step(view: FormationView) -> str:
    """What to type to see more."""
    failed = next((member for member in view.members if member.phase == "failed"), None)
    if view.has_ended and failed is not None and failed.run_id is not None:
        return f"cellos logs {view.label}/{failed.id}"
    return f"cellos describe formation {view.label}"


def _can_draw() -> bool:
    return sys.stdout.isatty() and os.environ.get("TERM", "") not in {"", "dumb"}


Tell = Callable[["FormationView"], None]


@contextmanager
def _unseen() -> Iterator[Tell]:
    yield lambda view: None


@contextmanager
def _lines() -> Iterator[Tell]:
    """A line per change, and one that sums up where it has ended."""
    began = time.monotonic()
    before: FormationView | None = None

    def tell(view: FormationView) -> None:
        nonlocal before
        for change in progress.changes(before, view):
            click.echo(line(time.monotonic() - began, view.label if change.member is None else change.member, change))
        if view.has_ended:
            click.echo(progress.summary(view, time.time_ns()))
        before = view
        sys.stdout.flush()

    yield tell


def line(elapsed: float, name: str, change: progress.Change) -> str:
    """`   1.2 s  count                     succeeded    exit 0, 34 ms on n1`."""
    word = change.word.replace("_", " ")
    return f"{progress.seconds(int(elapsed * 1e9)):>9}  {visible(name):{WIDTH_OF_NAME}}  {word:11}  {change.text}".rstrip()


@contextmanager
def _table() -> Iterator[Tell]:
    """A table that is drawn again and again, and stays as it is at the end."""
    from rich.console import Console
    from rich.live import Live

    console = Console(highlight=False, markup=False, emoji=False)
    view: FormationView | None = None

    def draw() -> RenderableType:
        return "" if view is None else table(view, time.time_ns(), console.height)

    def tell(news: FormationView) -> None:
        nonlocal view
        view = news

    with Live(get_renderable=draw, console=console, refresh_per_second=5, redirect_stdout=False, redirect_stderr=False):
        yield tell


def table(view: FormationView, now_ns: int, height: int) -> RenderableType:
    """The members, as many as fit, and a line about all of them."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    members, rest = progress.shown(view.members, max(3, height - 5))
    found = Table(box=None, pad_edge=False, show_edge=False)
    for head in ("MEMBER", "PHASE", "TRY", "NODE", "TIME", "NOTE"):
        found.add_column(head, no_wrap=True, overflow="ellipsis", justify="right" if head == "TIME" else "left", header_style="bold")
    for member in members:
        row = progress.row(member, now_ns)
        style = progress.PHASE_COLOURS.get(member.phase or "", "")
        found.add_row(*(Text(text, style=style if text == row.phase else "") for text in row))
    lines: list[RenderableType] = [found]
    if rest:
        lines.append(Text(rest, style="dim"))
    end = progress.summary(view, now_ns)
    return Group(*lines, Text(end, style="bold"))
