from __future__ import annotations

import subprocess
import sys

import click
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.cli.run_command import run
from cellos.cli.run_options import OPTIONS, asks_for_json, read

FLAGS = [option.flag for option in OPTIONS if option.metavar is None]
VALUED = [option.flag for option in OPTIONS if option.metavar is not None]


def by_click(arguments: list[str]) -> dict[str, object]:
    """Raises ClickException."""
    return run.make_context("run", list(arguments)).params


TEXTS = st.sampled_from(["30s", "1.5", "512M", "1g", "a", "a:b", "d/a:", "/", "", ":", "=", "a=b", "-", "--", "-x", "0", "\udcff", "KEY"])
ODD = st.sampled_from(["-", "--", "-h", "--help", "-x", "-ii", "-i=1", "--=x", "-=x", "--her", "---here", "", "x", "--here="])
WORDS = st.one_of(
    ODD,
    TEXTS,
    st.sampled_from([*FLAGS, *VALUED]),
    st.builds(lambda flag, text: f"{flag}={text}", st.sampled_from([*FLAGS, *VALUED]), TEXTS),
)


@given(st.lists(WORDS, max_size=8))
def test_what_is_read_is_what_click_reads(arguments: list[str]) -> None:
    values = read(arguments)
    if values is not None:
        assert values == by_click(arguments)


PLAIN = st.lists(
    st.one_of(
        st.sampled_from([[flag] for flag in FLAGS]),
        st.sampled_from(["30s", "1.5", "5m"]).map(lambda text: ["--timeout", text]),
        st.sampled_from(["512M", "65536"]).map(lambda text: [f"--mem={text}"]),
        st.sampled_from(["--ro", "--out", "--allow", "--secret"]).map(lambda flag: [flag, "name"]),
    )
)


@given(PLAIN, st.sampled_from([["--", "true"], ["true", "-h"], ["--", "--help"], ["sh", "-c", "x", "--", "--json"]]))
def test_a_plain_line_needs_no_click(options: list[list[str]], command: list[str]) -> None:
    arguments = [word for option in options for word in option] + command
    values = read(arguments)
    assert values == by_click(arguments)
    assert values["command"] == tuple(command[command[0] == "--" :])


@pytest.mark.parametrize(
    "line",
    [
        "",
        "--",
        "--here",
        "--help",
        "-h x",
        "-i --help -- x",
        "--bogus x",
        "--her x",
        "-ix x",
        "--here=1 x",
        "--mem 1P x",
        "--ro",
        "--out / x",
    ],
)
def test_click_explains_what_is_wrong(line: str) -> None:
    assert read(line.split()) is None


@pytest.mark.parametrize(
    ("line", "asked"),
    [
        ("--json", True),
        ("--bogus --json x", True),
        ("--timeout soon --json x", True),
        ("", False),
        ("--secret --json", False),
        ("--bogus x --json", False),
        ("--bogus -- --json", False),
    ],
)
def test_whether_a_wrong_line_asks_for_json(line: str, asked: bool) -> None:
    assert asks_for_json(line.split()) == asked


def test_click_knows_every_option() -> None:
    assert {name for parameter in run.params for name in parameter.opts} - {"command"} == {*FLAGS, *VALUED}
    assert all(isinstance(parameter, click.Argument) or parameter.help for parameter in run.params)  # type: ignore[attr-defined]


@pytest.mark.parametrize(("argument", "loaded"), [("--print-spec", "False"), ("--bogus", "True")])
def test_click_is_loaded_only_where_it_is_needed(argument: str, loaded: str) -> None:
    script = "import sys; from cellos.cli import main; main.leave = lambda _: print('click' in sys.modules); main.main()"
    result = subprocess.run([sys.executable, "-c", script, "run", argument, "true"], capture_output=True, text=True, check=False)
    assert result.stdout.splitlines()[-1:] == [loaded], result.stderr
