import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import click
import pytest

from cellos.cli import group, main
from cellos.cli.group import VERBS, Verb
from cellos.errors import ConfigError

MODULE = "verbs_of_this_test"


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Call `main` with a verb, `run` or `other`, that does what the test says."""
    seen = type(sys)(MODULE)

    def call(action: Callable[[click.Context], Any], *arguments: str, name: str = "other") -> int:
        @click.command(name=name)
        @click.argument("words", nargs=-1)
        @click.pass_context
        def command(ctx: click.Context, words: tuple[str, ...]) -> Any:
            return action(ctx)

        seen.command = command  # type: ignore[attr-defined]  # a module made for this test
        monkeypatch.setitem(sys.modules, MODULE, seen)
        monkeypatch.setitem(VERBS, name, Verb(f"{MODULE}:command", "A verb of this test."))
        monkeypatch.setattr(sys, "argv", ["cellos", name, *arguments])
        with pytest.raises(SystemExit) as ended:
            main.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code

    monkeypatch.setattr(main, "start_launcher", lambda: None)
    monkeypatch.setattr(main, "_run", lambda *_: None)  # what follows is about the frame
    monkeypatch.setattr(main, "leave", sys.exit)  # the real one would end the tests
    yield call
    import gc

    gc.enable()


def fail(error: BaseException) -> Callable[[click.Context], None]:
    def action(_: click.Context) -> None:
        raise error

    return action


class TestExitCodes:
    @pytest.mark.parametrize("name", ["run", "other"])
    @pytest.mark.parametrize("code", [0, 3, 124, 255])
    def test_of_the_verb(self, verb: Callable[..., int], name: str, code: int) -> None:
        assert verb(lambda _: code, name=name) == code
        assert verb(lambda ctx: ctx.exit(code), name=name) == code
        assert verb(lambda _: sys.exit(code), name=name) == code
        assert verb(lambda _: sys.exit(), name=name) == 0
        assert verb(lambda _: None, name=name) == 0

    @pytest.mark.parametrize(("name", "code"), [("run", 125), ("other", 1)])
    def test_of_an_exit_with_words(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str, code: int) -> None:
        assert verb(lambda _: sys.exit("no such thing"), name=name) == code
        assert capfd.readouterr() == ("", "cellos: no such thing\n")

    @pytest.mark.parametrize(("name", "code"), [("run", 125), ("other", 1)])
    def test_of_errors(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str, code: int) -> None:
        assert verb(fail(ConfigError("two\nlines \x1b[31m")), name=name) == code
        assert capfd.readouterr() == ("", "cellos: two\\nlines \\x1b[31m\n")

    @pytest.mark.parametrize(("name", "code"), [("run", 125), ("other", 2)])
    def test_of_usage(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str, code: int) -> None:
        assert verb(lambda _: 0, "--bogus", name=name) == code
        assert capfd.readouterr() == ("", f"cellos: no such option '--bogus' (see: cellos {name} --help)\n")

    @pytest.mark.parametrize(("name", "code"), [("run", 125), ("other", 1)])
    def test_of_defects(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str, code: int) -> None:
        assert verb(fail(ZeroDivisionError("division by zero")), name=name) == code
        error = capfd.readouterr().err
        assert error.startswith("cellos: internal error: ZeroDivisionError: division by zero (test_main.py:")
        assert error.count("\n") == 1

    def test_of_the_system(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str]) -> None:
        assert verb(fail(PermissionError(13, "Permission denied", "/x"))) == 1
        assert capfd.readouterr().err == "cellos: /x: Permission denied\n"

    @pytest.mark.parametrize("error", [KeyboardInterrupt(), click.Abort()])
    @pytest.mark.parametrize("name", ["run", "other"])
    def test_of_an_interrupt(self, verb: Callable[..., int], capfd: pytest.CaptureFixture[str], name: str, error: BaseException) -> None:
        assert verb(fail(error), name=name) == 130
        assert capfd.readouterr() == ("", "")


class TestLauncher:
    def test_it_is_started_before_click_is_loaded(self) -> None:
        """In a process of its own: here everything is loaded already."""
        script = (
            "import sys, types\n"
            "from cellos.cli import main\n"
            "class Launcher:\n"
            "    @classmethod\n"
            "    def start(cls, **options):\n"
            "        assert not {'click', 'msgspec', 'threading', 'asyncio', 'json'} & set(sys.modules), sorted(sys.modules)\n"
            "        print('started')\n"
            "        return cls()\n"
            "    def close(self):\n"
            "        print('closed')\n"
            "sys.modules['cellos.sandbox.launcher'] = module = types.ModuleType('launcher')\n"
            "module.Launcher = Launcher\n"
            "sys.argv = ['cellos', *sys.argv[1:]]\n"
            "main.main()\n"
        )
        for arguments, output in ((["run", "--bogus"], b"started\nclosed\n"), (["doctor", "--bogus"], b"")):
            environment = {name: value for name, value in os.environ.items() if name != "CELLOS_CELL_BACKEND"}
            result = subprocess.run([sys.executable, "-c", script, *arguments], env=environment, capture_output=True, check=False)
            assert result.stdout == output, result.stderr

    def test_the_verb_gets_it_and_it_is_closed(self, verb: Callable[..., int], monkeypatch: pytest.MonkeyPatch) -> None:
        log: list[object] = []

        class Launcher:
            def close(self) -> None:
                log.append("closed")

        launcher = Launcher()
        monkeypatch.setattr(main, "start_launcher", lambda: launcher)
        assert verb(lambda ctx: log.append(ctx.obj), name="run") == 0
        assert log == [launcher, "closed"]
        verb(fail(ConfigError("x")), name="run")
        assert log[2:] == ["closed"]
        verb(lambda ctx: log.append(ctx.obj))
        assert log[3:] == [None]

    def test_a_stub_needs_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELLOS_CELL_BACKEND", "stub")
        assert main.start_launcher() is None


def cellos(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "cellos.cli.main", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


class TestHelp:
    @pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
    def test_it_lists_the_verbs_and_teaches_by_example(self, arguments: list[str]) -> None:
        result = cellos(*arguments)
        assert (result.returncode, result.stderr) == (0, "")
        for name, each in VERBS.items():
            assert f"  {name}" in result.stdout
            assert each.help in result.stdout
        assert "cellos run -- echo hello" in result.stdout

    def test_it_loads_no_verb(self) -> None:
        script = "import sys; from cellos.cli.group import dispatch; dispatch(['--help'], None); sys.exit('msgspec' in sys.modules)"
        assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL, check=False).returncode == 0

    def test_version(self) -> None:
        from cellos import __version__

        assert cellos("--version").stdout == f"cellos {__version__}\n"

    @pytest.mark.parametrize(
        ("word", "line"),
        [
            ("evnts", "cellos: no such verb: evnts; did you mean events? (see: cellos --help)"),
            ("zzz", "cellos: no such verb: zzz (see: cellos --help)"),
        ],
    )
    def test_unknown_verb(self, word: str, line: str) -> None:
        result = cellos(word)
        assert (result.returncode, result.stdout, result.stderr) == (2, "", line + "\n")


class TestVerbs:
    @pytest.mark.parametrize("name", VERBS)
    def test_the_table_names_commands(self, name: str) -> None:
        command = group.cellos.get_command(click.Context(group.cellos), name)
        assert isinstance(command, click.Command)
        assert command.name == name
        assert command.help


class TestCompletion:
    @pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
    def test_scripts(self, shell: str) -> None:
        result = cellos("completion", shell)
        assert (result.returncode, result.stderr) == (0, "")
        assert f"_CELLOS_COMPLETE={shell}_complete" in result.stdout

    def test_another_shell(self) -> None:
        result = cellos("completion", "csh")
        assert result.returncode == 2
        assert "'csh' is not one of 'bash', 'zsh', 'fish'" in result.stderr

    def test_bash_completes(self) -> None:
        environment = os.environ | {"_CELLOS_COMPLETE": "bash_complete", "COMP_WORDS": "cellos e", "COMP_CWORD": "1"}
        result = cellos(env=environment)
        assert (result.returncode, result.stdout) == (0, "plain,events\n")

    @pytest.mark.parametrize("words", ["cellos evnts ", "cellos evnts x -", "cellos run --bogus --timeout soon "])
    def test_nothing_follows_a_mistake_and_nothing_is_said(self, words: str) -> None:
        typed = words.split(" ")
        environment = {"_CELLOS_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(len(typed) - 1)}
        result = cellos(env=os.environ | environment)
        assert (result.returncode, result.stdout.strip(), result.stderr) == (0, "", "")


class TestOutput:
    def test_a_reader_that_is_gone_is_no_error(self) -> None:
        reading, writing = os.pipe()
        os.close(reading)
        result = subprocess.run([sys.executable, "-m", "cellos.cli.main", "--help"], stdout=writing, stderr=subprocess.PIPE, check=False)
        os.close(writing)
        assert (result.returncode, result.stderr) == (141, b"")

    def test_a_full_disk_is_one(self) -> None:
        with open("/dev/full", "wb") as full:
            result = subprocess.run([sys.executable, "-m", "cellos.cli.main", "--help"], stdout=full, stderr=subprocess.PIPE, check=False)
        assert (result.returncode, result.stderr) == (1, b"cellos: cannot write to standard output: No space left on device\n")

    def test_one_that_does_not_block_is_waited_for(self) -> None:
        """A full pipe, read only when somebody waits for it."""
        script = """
import os, select, sys
from cellos.cli.group import dispatch

reading, writing = os.pipe()
os.set_blocking(writing, False)
os.dup2(writing, 1)
try:
    while True:
        os.write(1, b"." * 4096)
except BlockingIOError:
    pass

class Poll:
    def register(self, *_):
        pass

    def poll(self):
        os.read(reading, 1 << 20)

select.poll = Poll
dispatch(["--help"], None)
sys.stdout.flush()
shown = os.read(reading, 1 << 20).decode()
assert shown.startswith("Usage: ") and shown.endswith("cellos run --help.\\n"), shown
"""
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")

    @pytest.mark.parametrize("arguments", [["--help"], ["events"], ["events", "--json"], ["doctor", "--help"]])
    def test_one_that_was_closed_is_none(self, arguments: list[str]) -> None:
        golden = os.path.join(os.path.dirname(__file__), "../../golden/events/run.jsonl")
        line = [sys.executable, "-m", "cellos.cli.main", *arguments, *([golden] if "events" in arguments else [])]
        done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *line], capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, b"")

    def test_an_output_that_cannot_hold_the_text(self) -> None:
        golden = os.path.join(os.path.dirname(__file__), "../../golden/events/hostile.jsonl")
        result = cellos("events", golden, env=os.environ | {"PYTHONIOENCODING": "ascii"})
        assert (result.returncode, result.stderr) == (0, "")
        assert r"'\xe9\u2713'" in result.stdout
