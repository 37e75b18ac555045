"""Write the generated part of a page anew: the variables of the supervisor, from their table in the code.

`PYTHONPATH=src python scripts/pages.py`. A test compares both, so a forgotten call shows.
"""

from __future__ import annotations

from pathlib import Path

from cellos.supervisor.variables import tables

PAGE = Path(__file__).parents[1] / "docs/reference/supervisor.md"
BEGIN, END = "<!-- variables: begin -->\n", "<!-- variables: end -->\n"


def main() -> None:
    before, _, rest = PAGE.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    PAGE.write_text(f"{before}{BEGIN}\n{tables()}\n{END}{after}")


if __name__ == "__main__":
    main()
