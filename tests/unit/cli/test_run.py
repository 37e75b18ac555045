from __future__ import annotations

from typing import Any

import click
import pytest
from click.testing import CliRunner

from cellos.cli import run as module
from cellos.cli.run_command import run
from cellos.client.local import Options


def parsed(*arguments: str) -> dict[str, object]:
    """What the options mean, without running anything."""
    seen: dict[str, object] = {}

    @click.pass_context
    def keep(ctx: click.Context, /, **given: object) -> None:
        seen.update(given)

    command = click.Command("run", callback=keep, params=run.params, context_settings=run.context_settings)
    done = CliRunner().invoke(command, list(arguments))
    assert done.exit_code == 0, done.output
    return seen


@pytest.mark.parametrize(
    ("text", "milliseconds"),
    [
        ("30s", 30_000),
        ("1500ms", 1500),
        ("5m", 300_000),
        ("1h", 3_600_000),
        ("2", 2000),
        ("1.5s", 1500),
        ("0.001s", 1),
        ("999999999h", 3_599_999_996_400_000),
    ],
)
def test_times(text: str, milliseconds: int) -> None:
    assert parsed("--timeout", text, "x")["timeout_ms"] == milliseconds


@pytest.mark.parametrize("text", ["", "0", "-1s", "1d", "s", "1 s", "1e3", "٣s", "0.0001ms", "9999999999s", "1.2345s", "inf", "nan"])
def test_what_is_no_time(text: str) -> None:
    done = CliRunner().invoke(run, ["--timeout", text, "x"])
    assert done.exit_code == 2
    assert "is not a time above 0" in done.output


@pytest.mark.parametrize(
    ("text", "size"),
    [("512M", 512 << 20), ("1g", 1 << 30), ("64K", 65536), ("1000", 1000), ("2GiB", 2 << 30), ("3MB", 3 << 20)],
)
def test_sizes(text: str, size: int) -> None:
    assert parsed("--mem", text, "x")["memory_bytes"] == size


@pytest.mark.parametrize("text", ["", "0", "-1", "1P", "M", "1.5G", "٣M", "999999999999999T"])
def test_what_is_no_size(text: str) -> None:
    done = CliRunner().invoke(run, ["--mem", text, "x"])
    assert done.exit_code == 2
    assert "is not a size above 0" in done.output


def test_files() -> None:
    assert parsed("--out", "a", "--out", "d/b", "--out", "c:/x/y", "--out", "e:", "--out", "f:g:h", "x")["out"] == (
        ("a", "a"),
        ("d/b", "b"),
        ("c", "/x/y"),
        ("e", "e"),
        ("f", "g:h"),
    )


def test_everything_after_the_command_is_the_commands() -> None:
    assert parsed("--here", "cmd", "--here", "-i", "--", "x")["command"] == ("cmd", "--here", "-i", "--", "x")
    assert parsed("--", "--odd")["command"] == ("--odd",)


def test_text_that_is_not_utf8_is_base64() -> None:
    assert module._text("stdout", "é".encode()) == {"stdout": "é"}
    assert module._text("stdout", b"\xff") == {"stdout": "/w==", "stdoutEncoding": "base64"}


@pytest.mark.parametrize("as_json", [False, True])
def test_output_that_is_ours_waits_for_its_reader(monkeypatch: pytest.MonkeyPatch, as_json: bool) -> None:
    seen: dict[str, Any] = {}
    monkeypatch.setattr("cellos.supervisor.compose.open_host", lambda *_: None)
    monkeypatch.setattr("cellos.client.local.run_options", lambda *_, **given: seen.update(given))
    module._execute(Options(argv=("true",), cell_id="c"), {}, None, 0, interactive=False, as_json=as_json)
    assert [(seen[name].descriptor, seen[name].wait) for name in ("stdout", "stderr")] == (
        [(None, False)] * 2 if as_json else [(1, True), (2, True)]
    )
