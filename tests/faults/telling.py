"""What programs that stop themselves at a step have in common: they lie beside this file, and are run, not imported."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def of_the_start(original: Callable[..., Any], reached: Callable[[str], None]) -> Callable[..., Any]:
    """`LinuxCell.run` that reaches the step `started` when the command runs, before anybody else hears of it."""

    def run(cell: Any, command: Any, *, on_started: Callable[[], None]) -> Any:
        def heard() -> None:
            reached("started")
            on_started()

        return original(cell, command, on_started=heard)

    return run
