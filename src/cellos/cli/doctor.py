"""`cellos doctor`: can this host hold a cell, and if not, what is missing and what to do about it."""

from __future__ import annotations

import json
import sys

import click


@click.command()
@click.option("--json", "as_json", is_flag=True, help="One JSON object on standard output.")
def doctor(as_json: bool) -> None:
    """Try every primitive that a cell needs, and name the cure for what is missing.

    Exit code 0 when cells can run here, 1 when they cannot. Rows marked `limited` do not stop a cell: what they name stays unbounded,
    and a spec that declares such a limit is refused.
    """
    from dataclasses import asdict

    from cellos.sandbox.probe import rows
    from cellos.supervisor.state import check_state_directory

    found = [*rows(), check_state_directory()]
    ok = all(row.ok for row in found if row.required)
    if as_json:
        click.echo(json.dumps({"ok": ok, "rows": [asdict(row) for row in found]}))
        sys.exit(0 if ok else 1)
    width = max(len(row.primitive) for row in found)
    for row in found:
        word, colour = ("ok", "green") if row.ok else ("MISSING", "red") if row.required else ("limited", "yellow")
        click.echo(f"{click.style(f'{word:8}', fg=colour)} {row.primitive:{width}}  {row.detail}")
        if row.cure:
            click.echo(f"{'':8} {'':{width}}  -> {row.cure}")
    click.echo()
    missing = [row.primitive for row in found if row.required and not row.ok]
    click.echo("Cells can run here." if ok else f"Cells cannot run here: {missing[0]} is missing.")
    sys.exit(0 if ok else 1)
