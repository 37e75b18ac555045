"""Write the generated parts of the reference anew, from the tables in the code.

`PYTHONPATH=src python scripts/pages.py`. Tests compare both, so a forgotten call shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cellos.controller import config as controller_config
from cellos.fleet import config as fleet_config
from cellos.node import config as node_config
from cellos.server import config, hub, routes
from cellos.supervisor.variables import tables

REFERENCE = Path(__file__).parents[1] / "docs/reference"
PARTS: tuple[tuple[str, str, Callable[[], str]], ...] = (
    ("supervisor.md", "variables", tables),
    ("server.md", "routes", routes.table),
    ("server.md", "variables", config.table),
    ("server.md", "close codes", hub.close_table),
    ("controller.md", "variables", controller_config.table),
    ("node.md", "variables", node_config.table),
    ("node.md", "without effect", node_config.without_effect),
    ("fleet.md", "variables", fleet_config.table),
)
"""Page, what its markers are called, and what stands between them."""


def between(name: str) -> tuple[str, str]:
    """The markers around a part."""
    return f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->\n"


def main() -> None:
    for page, name, make in PARTS:
        path = REFERENCE / page
        begin, end = between(name)
        before, _, rest = path.read_text().partition(begin)
        _, _, after = rest.partition(end)
        path.write_text(f"{before}{begin}\n{make()}\n{end}{after}")


if __name__ == "__main__":
    main()
