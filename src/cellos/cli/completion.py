"""`cellos completion SHELL`: the script that teaches a shell to complete `cellos`."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")


@click.command(
    epilog="""\b
Examples:
  eval "$(cellos completion bash)"                                     in ~/.bashrc
  cellos completion zsh > "${fpath[1]}/_cellos"                        once
  cellos completion fish > ~/.config/fish/completions/cellos.fish      once
"""
)
@click.argument("shell", type=click.Choice(SHELLS))
def completion(shell: str) -> None:
    """Print the completion script of a shell."""
    from click.shell_completion import ShellComplete, get_completion_class

    from cellos.cli.group import PROGRAM, cellos
    from cellos.cli.process import COMPLETION_VARIABLE

    kind = get_completion_class(shell)
    if kind is None:
        raise click.UsageError(f"click cannot complete in {shell}")
    # Not kind.source: for bash it starts one to ask for its version, which tells nothing about the bash that reads the script.
    click.echo(ShellComplete.source(kind(cellos, {}, PROGRAM, COMPLETION_VARIABLE)))
