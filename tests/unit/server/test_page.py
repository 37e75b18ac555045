"""The reference page is what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from cellos.daemon import process
from cellos.server import config, hub, routes

PAGE = Path(__file__).parents[3] / "docs/reference/server.md"


@pytest.mark.parametrize(("name", "text"), [("routes", routes.table()), ("variables", config.table()), ("close codes", hub.close_table())])
def test_generated_parts_are_new(name: str, text: str) -> None:
    # To renew them: PYTHONPATH=src python scripts/pages.py
    generated = PAGE.read_text().partition(f"<!-- {name}: begin -->\n")[2].partition(f"<!-- {name}: end -->")[0]
    assert generated.strip() == text.strip()


def test_what_the_configuration_reads_is_in_the_table() -> None:
    asked: set[str] = set()

    class Spy(dict[str, str]):
        def get(self, name: str, *default: str) -> str | None:  # type: ignore[override]
            asked.add(name)
            return super().get(name, *default)

    config.read_config(Spy({config.TOKEN: "t"}))
    assert asked | {"RUST_LOG", "LISTEN_FDS", "LISTEN_PID"} == {row.name for row in config.VARIABLES}


def test_messages_of_the_log_are_those_of_the_code() -> None:
    section = PAGE.read_text().partition("\n## Log\n")[2].partition("\n## ")[0]
    messages = re.findall(r"`([^`]+)`", "".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `")))
    assert len(messages) == 10
    code = "".join(path.read_text() for path in Path(config.__file__).parent.glob("*.py"))
    code += Path(process.__file__).read_text().replace("%s", "cellos-server")
    assert [message for message in messages if f'"{message}"' not in code] == []


def test_the_example_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    data = b'{"cellId":"c","specId":"s"}'
    payload = b'{"specversion":"1.0","id":"e","source":"s","type":"dev.cellos.events.cell.lifecycle.v1.started","data":%s}' % data
    names: dict[str, Any] = {"payload": payload}
    exec(code, names)
    assert names["state"].projection.cell("c") is not None
    assert callable(names["app"])
