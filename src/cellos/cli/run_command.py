"""`cellos run` as a click command: its help, its completion, and what is wrong with a command line. See run_options.py."""

from __future__ import annotations

from typing import Any

import click

from cellos.cli import run as program
from cellos.cli.run_options import OPTIONS, Option


def _option(option: Option) -> click.Option:
    if option.metavar is None:
        return click.Option([option.flag, option.name], is_flag=True, help=option.help)

    def convert(_: click.Context, parameter: click.Parameter, given: str | tuple[str, ...] | None) -> object:
        try:
            if isinstance(given, tuple):
                return tuple(option.convert(text) for text in given)
            return None if given is None else option.convert(given)
        except ValueError as error:
            raise click.BadParameter(str(error), param=parameter) from None

    return click.Option([option.flag, option.name], metavar=option.metavar, multiple=option.many, callback=convert, help=option.help)


_COMMAND = click.Argument(["command"], nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")


@click.command(context_settings={"allow_interspersed_args": False}, params=[*map(_option, OPTIONS), _COMMAND])
@click.pass_context
def run(ctx: click.Context, /, **given: Any) -> int:
    """Run a COMMAND in a cell: no network, no files of this host but the system, nothing left afterwards.

    Exit code: the command's own; 124 time-out, 126 cannot be executed, 127 not found, 128 + n signal n, 125 ours.
    """
    return program.run(ctx.obj, **given)
