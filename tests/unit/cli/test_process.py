from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

import pytest

from cellos.cli.process import STOP_SIGNALS, StopSignals, say


def readable(descriptor: int) -> bool:
    return bool(select.select([descriptor], [], [], 0)[0])


class TestStopSignals:
    @pytest.mark.parametrize("number", STOP_SIGNALS)
    def test_a_signal_becomes_readable(self, number: int) -> None:
        with StopSignals() as stop:
            assert not readable(stop.descriptor)
            signal.raise_signal(number)
            assert readable(stop.descriptor)
            assert stop.received == number

    def test_the_first_one_counts(self) -> None:
        with StopSignals() as stop:
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGTERM):
                signal.raise_signal(number)
            assert stop.received == signal.SIGTERM

    def test_one_that_comes_again_later_hangs_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """At once it is the same request, sent twice."""
        now = [100.0]
        monkeypatch.setattr("cellos.cli.process.time.monotonic", lambda: now[0])
        with StopSignals() as stop:
            poll = select.poll()
            poll.register(stop.descriptor, 0)
            for after, hung_up in (
                (0.0, []),
                (0.4, []),
                (0.2, [(stop.descriptor, select.POLLHUP)]),
                (1.0, [(stop.descriptor, select.POLLHUP)]),
            ):
                now[0] += after
                signal.raise_signal(signal.SIGTERM)
                assert poll.poll(0) == hung_up
            assert readable(stop.descriptor)

    def test_what_was_ignored_stays_ignored(self) -> None:
        before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        try:
            with StopSignals() as stop:
                signal.raise_signal(signal.SIGHUP)
                assert stop.received is None
        finally:
            signal.signal(signal.SIGHUP, before)

    def test_everything_is_put_back(self) -> None:
        before = [signal.getsignal(number) for number in STOP_SIGNALS]
        descriptors = os.listdir("/proc/self/fd")
        with StopSignals():
            pass
        assert [signal.getsignal(number) for number in STOP_SIGNALS] == before
        assert os.listdir("/proc/self/fd") == descriptors


class TestSay:
    def test_one_line_without_escapes(self, capfd: pytest.CaptureFixture[str]) -> None:
        say("two\nlines \x1b[31m café ✓ \udcff \u202e")
        assert capfd.readouterr().err == "two\\nlines \\x1b[31m café ✓ \\udcff \\u202e\n"


def python(*lines: str) -> str:
    """What a script prints in a process of its own: here everything is loaded already."""
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


LATER = sys.version_info >= (3, 12)
"""Of these versions nobody has measured what msgspec needs of `re` and `enum`: they are loaded."""


class TestMsgspec:
    def test_what_no_run_uses_is_loaded_by_whoever_uses_it(self) -> None:
        assert python(
            "import sys; from cellos.cli.process import load_msgspec; load_msgspec()",
            "print(sorted({'uuid', 'platform', 'decimal', 'inspect'} & {*sys.modules}))",
            "import textwrap, uuid, decimal, platform, datetime, pickle, msgspec",
            "print(textwrap.dedent(' a'), uuid.UUID(int=1).int, decimal.Decimal('1.5'), platform.system())",
            "print(msgspec.inspect.type_info(int), msgspec.yaml.decode('[1]'), msgspec.json.schema(int), msgspec.msgpack.encode(1))",
            "import msgspec.inspect",
            "print(msgspec.inspect.type_info(str), sys.modules['msgspec.inspect'].__file__ is not None)",
            "moment = datetime.datetime(2026, 1, 2, tzinfo=datetime.timezone.utc)",
            "print(msgspec.json.encode(moment), pickle.loads(pickle.dumps(moment)) == moment, datetime.UTC)",
        ).splitlines() == [
            "[]", "a 1 1.5 Linux", "IntType(gt=None, ge=None, lt=None, le=None, multiple_of=None) [1] {'type': 'integer'} b'\\x01'",
            "StrType(min_length=None, max_length=None, pattern=None) True", "b'\"2026-01-02T00:00:00Z\"' True UTC",
        ]  # fmt: skip

    def test_it_is_loaded_without_typing_extensions(self) -> None:
        assert python(
            "import sys; from cellos.cli.process import load_msgspec; load_msgspec()",
            "print('msgspec' in sys.modules, 'inspect' in sys.modules)",
            "from typing_extensions import TypedDict",
            "from typing import Required",
            "from msgspec import json, Struct",
            "class Part(TypedDict): x: Required[int]",
            "class Whole(Struct): part: Part",
            'print(json.decode(\'{"part": {"x": 1}}\', type=Whole))',
        ).splitlines() == ["True False", "Whole(part={'x': 1})"]

    def test_what_is_loaded_already_stays(self) -> None:
        assert python(
            "import sys, typing_extensions; from cellos.cli.process import load_msgspec; load_msgspec()",
            "print(sys.modules['typing_extensions'] is typing_extensions)",
        ) == "True\n"  # fmt: skip

    def test_patterns_and_enumerations_are_loaded_by_whoever_uses_them(self) -> None:
        assert python(
            "import sys; from cellos.cli.process import load_msgspec; load_msgspec()",
            "print('re' in sys.modules, 'enum' in sys.modules)",
            "import typing, msgspec",
            "class Marked(msgspec.Struct): name: typing.Annotated[str, msgspec.Meta(pattern='^a+$')]",
            "print(msgspec.json.decode('{\"name\": \"aa\"}', type=Marked))",
            "try: msgspec.json.decode('{\"name\": \"b\"}', type=Marked)",
            "except msgspec.ValidationError as error: print(error)",
            "import enum, re",
            "print(typing.Pattern[str].__origin__ is re.Pattern, typing.Match[str].__origin__ is re.Match)",
            "print(typing.get_type_hints(type('A', (), {'__annotations__': {'x': 'int'}})), enum.Enum('E', 'A').A.value)",
        ).splitlines() == [
            f"{LATER} {LATER}", "Marked(name='aa')", "Expected `str` matching regex '^a+$' - at `$.name`",
            "True True", "{'x': <class 'int'>} 1",
        ]  # fmt: skip

    def test_what_is_set_on_a_module_that_is_not_there_yet_counts(self) -> None:
        assert python(
            "from cellos.cli.process import load_msgspec; load_msgspec()",
            "import warnings; warnings.showwarning = lambda message, *_: print('seen:', message)",
            "warnings.warn('x')",
        ) == "seen: x\n"  # fmt: skip

    def test_it_may_be_loaded_twice(self) -> None:
        assert python("from cellos.cli.process import load_msgspec as load; load(); load(); import typing_extensions; load()") == ""


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-", "0<&- 1>&- 2>&-"])
def test_what_was_closed_is_nobodys(closed: str) -> None:
    code = (
        "import os; from cellos.cli.process import secure_standard_streams; secure_standard_streams(); "
        "assert os.open('/', os.O_RDONLY) > 2; assert all(os.get_inheritable(number) for number in (0, 1, 2)); "
        "import sys; sys.stdin.fileno(); print('x', flush=True); print('x', file=sys.stderr)"
    )
    done = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-c", code], timeout=60, check=False)
    assert done.returncode == 0
