"""`cellos delete formation NAME`: end a formation."""

from __future__ import annotations

import sys
from contextlib import suppress

import click

from cellos.cli.control_plane import connected, server_options
from cellos.cli.get import complete_name
from cellos.cli.process import say
from cellos.core.formation.transitions import TERMINAL
from cellos.errors import CellosError, ConfigError


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def delete() -> None:
    """End what the control plane runs."""


@delete.command(
    epilog="""\b
Examples:
  cellos delete formation demo
  cellos delete formation demo --yes         without a question, for scripts
"""
)
@click.argument("name", shell_complete=complete_name)
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@server_options
def formation(name: str, yes: bool, server: str | None, token_file: str | None) -> None:
    """End a formation, by its name or its id: its cells are stopped, then the name is free. Its record stays."""
    from cellos.client.answers import status_of

    with connected(server, token_file, writes=True) as found:
        if not yes:
            click.echo(f"Delete formation '{name}'? This is irreversible. [y/N] ", nl=False, err=True)
            if sys.stdin.readline().strip().lower() not in {"y", "yes"}:
                raise ConfigError("nothing was deleted; answer y, or add --yes")
        before = status_of(found.formation(name))
        found.delete(name)
        after = ""
        with suppress(CellosError):  # it is done; that this cannot be told is no failure
            after = status_of(found.formation(name))
    click.echo(f"formation/{name} deleted")
    if before in TERMINAL:
        say(f"cellos: it had ended already ({before}) and stays listed")
    elif after and after not in TERMINAL:
        say(f"cellos: its cells are being ended; see: cellos wait formation {name}")
