"""The verbs of `cellos`: a table of what there is, and a click group that loads a verb only when it is used."""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import click

from cellos.cli.process import COMPLETION_VARIABLE, write_all
from cellos.errors import CellosError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from click.shell_completion import CompletionItem

    from cellos.sandbox.launcher import Launcher

PROGRAM = "cellos"


class Verb(NamedTuple):
    """`place` is module:attribute of the click command; `help` is one line, so that the list of verbs needs none of them."""

    place: str
    help: str


VERBS = {
    "run": Verb("cellos.cli.run_command:run", "Run a command in a cell of its own, and keep evidence of it."),
    "events": Verb("cellos.cli.events:events", "Show what happened in a run, and check the record for changes."),
    "up": Verb("cellos.cli.up:up", "Start a control plane on this machine."),
    "get": Verb("cellos.cli.get:get", "List the cells, formations or nodes of the control plane."),
    "apply": Verb("cellos.cli.apply:apply", "Hand a formation to the control plane."),
    "wait": Verb("cellos.cli.wait:wait", "Wait until a formation has ended, and see how it goes."),
    "logs": Verb("cellos.cli.logs:logs", "Show what a cell wrote."),
    "describe": Verb("cellos.cli.describe:describe", "Say all about a formation, a cell or a node, and why it waits."),
    "delete": Verb("cellos.cli.delete:delete", "End a formation."),
    "fleet": Verb("cellos.cli.fleet:fleet", "Hand specs to the agents of a bucket, and look at results."),
    "spool": Verb("cellos.cli.spool:spool", "List and send events that wait for NATS."),
    "doctor": Verb("cellos.cli.doctor:doctor", "Say whether this host can hold cells, and what to do if not."),
    "completion": Verb("cellos.cli.completion:completion", "Print the completion script of a shell."),
}

EXAMPLES = """\
\b
Examples:
  cellos run -- echo hello                       nothing of this host but the system is visible
  cellos run --here -- python3 test.py           the current directory, read-only
  cellos run --here --mem 512M -- ./job          a limit, on top of those that always apply
  cellos events                                  the latest run, step by step, verified
  cellos up                                      a control plane: who reports there is seen in one place
  cellos apply -f formation.yaml --wait          many cells that depend on each other, seen through
  cellos doctor                                  can this host hold cells?

Each verb explains itself: cellos run --help.
"""


class UsageError(CellosError):
    """The command line cannot be understood."""

    code = "usage"


class VerbGroup(click.Group):
    """A group whose commands stand in `VERBS`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        verb = VERBS.get(cmd_name)
        if verb is None:
            return None
        module, _, attribute = verb.place.partition(":")
        __import__(module)
        command: click.Command = getattr(sys.modules[module], attribute)
        return command

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in VERBS and not args[0].startswith("-"):
            if ctx.resilient_parsing:  # a shell asks what could follow: nothing
                return args[0], click.Command(args[0], add_help_option=False), args[1:]
            raise click.UsageError(f"no such verb: {args[0]}{_nearest(args[0])}", ctx)
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Verbs"):
            formatter.write_dl([(name, verb.help) for name, verb in VERBS.items()])

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        from click.shell_completion import CompletionItem

        found = [CompletionItem(name, help=verb.help) for name, verb in VERBS.items() if name.startswith(incomplete)]
        return found + click.Command.shell_complete(self, ctx, incomplete)


class _Waiting(io.FileIO):
    """A descriptor that does not block, for writing: what it cannot take now waits."""

    def write(self, data: ReadableBuffer) -> int:
        view = memoryview(data)
        write_all(self.fileno(), view)
        return view.nbytes


def _print_version(ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
    if wanted:
        from cellos import __version__

        click.echo(f"{PROGRAM} {__version__}")
        ctx.exit()


@click.group(
    cls=VerbGroup,
    name=PROGRAM,
    epilog=EXAMPLES,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    subcommand_metavar="VERB [ARGUMENTS]...",
)
@click.option("--version", is_flag=True, expose_value=False, is_eager=True, callback=_print_version, help="Show the version and exit.")
@click.pass_context
def cellos(ctx: click.Context) -> None:
    """Run untrusted work in cells: isolated, short-lived processes with declared authority and a record that can be verified."""
    if ctx.invoked_subcommand is None:
        click.echo(ctx.get_help())


def dispatch(arguments: Sequence[str], launcher: Launcher | None) -> int:
    """Do what the command line says; the exit code. The launcher, where there is one, is `ctx.obj` of the verb.

    Raises UsageError, KeyboardInterrupt, and what the verb raises.
    """
    instruction = os.environ.get(COMPLETION_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(cellos, {}, PROGRAM, COMPLETION_VARIABLE, instruction)
    if not os.get_blocking(1):
        waiting = io.BufferedWriter(_Waiting(1, "wb", closefd=False))
        sys.stdout = io.TextIOWrapper(waiting, sys.stdout.encoding, line_buffering=waiting.isatty())
    # What programs print and name is not always text in the caller's encoding.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]  # ours is a TextIOWrapper
    try:
        with cellos.make_context(PROGRAM, list(arguments), obj=launcher) as ctx:
            gc.enable()
            answer = cellos.invoke(ctx)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.Abort:
        raise KeyboardInterrupt from None
    except click.ClickException as error:
        raise UsageError(_usage_text(error)) from None
    return answer if isinstance(answer, int) else 0


def _usage_text(error: click.ClickException) -> str:
    """One line: what is wrong, and where to read on."""
    path = error.ctx.command_path if isinstance(error, click.UsageError) and error.ctx is not None else PROGRAM
    message = " ".join(error.format_message().split())
    return f"{message[:1].lower()}{message[1:].rstrip('.')} (see: {path} --help)"


def _nearest(name: str) -> str:
    from difflib import get_close_matches

    found = get_close_matches(name, VERBS, n=1)
    return f"; did you mean {found[0]}?" if found else ""
