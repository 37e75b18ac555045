"""The finder of our own modules, in processes of its own and with a package of its own: a copy of ours with two modules."""

from __future__ import annotations

import marshal
import os
import py_compile
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import cellos.compiled

SHOW = (
    "import cellos.part, cellos.sub.leaf; print(cellos.part.VALUE, cellos.sub.leaf.VALUE); "
    "print(*sorted(type(cellos.__dict__[name].__loader__).__name__ for name in ('part', 'sub')))"
)
OURS = "_Loader _Loader"
STANDARD = "SourceFileLoader SourceFileLoader"


@pytest.fixture
def package(tmp_path: Path) -> Path:
    root = tmp_path / "cellos"
    (root / "sub").mkdir(parents=True)
    shutil.copy(cellos.compiled.__file__, root / "compiled.py")
    for name, text in (("__init__", ""), ("part", "VALUE = 1"), ("sub/__init__", ""), ("sub/leaf", "VALUE = 2")):
        (root / f"{name}.py").write_text(text)
        py_compile.compile(str(root / f"{name}.py"), doraise=True)
    return root


def python(package: Path, code: str, *options: str) -> list[str]:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(package.parent), "PYTHONDONTWRITEBYTECODE": "1"}
    begin = "from cellos.compiled import prefer_compiled; prefer_compiled()\n"
    command = [sys.executable, "-S", *options, "-c", begin + code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_modules_and_packages_come_from_their_compiled_files(package: Path) -> None:
    assert python(package, SHOW) == ["1 2", OURS]


def test_they_are_as_the_standard_finder_would_have_made_them(package: Path) -> None:
    show = "; ".join(
        f"print(module.__name__, module.__file__, module.__cached__, module.__package__, {paths}, module.__spec__.origin, "
        "module.__spec__.parent, module.__spec__.has_location)"
        for paths in ["getattr(module, '__path__', None)"]
    )
    code = f"import cellos.part, cellos.sub\nfor module in (cellos.part, cellos.sub): {show}"
    ours = python(package, code)
    assert len(ours) == 2
    assert ours == python(package, "sys = __import__('sys'); del sys.meta_path[0]\n" + code)


def test_inspection_finds_the_source(package: Path) -> None:
    assert python(package, "import inspect, cellos.part; print(inspect.getsource(cellos.part))")[:1] == ["VALUE = 1"]


def test_a_changed_source_counts(package: Path) -> None:
    (package / "part.py").write_text("VALUE = 30")
    assert python(package, SHOW) == ["30 2", "SourceFileLoader _Loader"]


def test_a_source_of_another_time_counts(package: Path) -> None:
    part = package / "part.py"
    part.write_text("VALUE = 3")
    os.utime(part, (1, 1))
    assert python(package, SHOW)[0] == "3 2"


def compiled_part(package: Path) -> Path:
    return package / "__pycache__" / f"part.{sys.implementation.cache_tag}.pyc"


@pytest.mark.parametrize("beginning", [b"", b"short", b"\0\0\r\n" + bytes(12)], ids=["empty", "short", "of another version"])
def test_a_compiled_file_that_is_not_right_is_not_used(package: Path, beginning: bytes) -> None:
    whole = compiled_part(package).read_bytes()
    compiled_part(package).write_bytes(beginning + whole[16:] if len(beginning) == 16 else beginning)
    assert python(package, SHOW)[0] == "1 2"


@pytest.mark.parametrize(("content", "error"), [(b"", "EOFError"), (marshal.dumps(7), "ImportError: Non-code object")])
def test_a_damaged_one_is_the_standard_finders_to_refuse(package: Path, content: bytes, error: str) -> None:
    compiled_part(package).write_bytes(compiled_part(package).read_bytes()[:16] + content)
    with pytest.raises(AssertionError, match=error):
        python(package, SHOW)


def test_a_tree_that_was_moved_is_named_by_its_new_place(package: Path) -> None:
    moved = package.parent / "moved"
    shutil.copytree(package, moved / "cellos", copy_function=shutil.copy2)
    (package / "part.py").unlink()
    code = "import cellos.part; print(cellos.part.__loader__.get_code('cellos.part').co_filename)"
    assert python(moved / "cellos", code) == [str(moved / "cellos/part.py")]


def test_a_package_without_a_directory_is_not_the_standard_library(package: Path) -> None:
    code = "import sys, types; six = sys.modules['six'] = types.ModuleType('six'); six.__path__ = []\n"
    code += "try: import six.colorsys\nexcept ModuleNotFoundError as error: print(error)"
    assert python(package, code) == ["No module named 'six.colorsys'"]


def test_without_compiled_files(package: Path) -> None:
    for directory in (package, package / "sub"):
        shutil.rmtree(directory / "__pycache__")
    assert python(package, SHOW) == ["1 2", STANDARD]


@pytest.mark.parametrize("options", [("-O",), ("-X", "pycache_prefix=/nonexistent")], ids=" ".join)
def test_where_compiled_files_are_elsewhere(package: Path, options: tuple[str, ...]) -> None:
    assert python(package, SHOW, *options) == ["1 2", STANDARD]


def test_the_standard_library_and_nobody_elses_modules(package: Path) -> None:
    (package.parent / "other").mkdir()
    for name in ("__init__", "part"):
        (package.parent / "other" / f"{name}.py").write_text("VALUE = 1")
        py_compile.compile(str(package.parent / "other" / f"{name}.py"), doraise=True)
    show = "for module in (colorsys, json, json.tool, other, other.part): print(type(module.__loader__).__name__)"
    assert python(package, f"import colorsys, json.tool, other.part\n{show}") == ["_Loader", "_Loader", *["SourceFileLoader"] * 3]


def test_what_is_not_there_is_not_found(package: Path) -> None:
    assert python(package, "try: import cellos.absent\nexcept ModuleNotFoundError as error: print(error)") == [
        "No module named 'cellos.absent'"
    ]
