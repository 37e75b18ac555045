from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError
from cellos.supervisor.rates import HourlyLimit

NOW = 1_800_000_000.0
FILE_BYTES = 3601 * 16

ADMIT = """
import sys
from cellos.supervisor.rates import HourlyLimit
limit = HourlyLimit(sys.argv[1])
print(sum(limit.admit("acme", 100, 1800000000.0 + turn % 50) for turn in range(60)))
"""
ADMIT_FOR_EVER = """
import os, sys
from cellos.supervisor.rates import HourlyLimit
limit, now = HourlyLimit(sys.argv[1]), float(sys.argv[2])
while True:
    assert limit.admit("acme", 10**9, now)
    os.write(1, b".")
    now += 0.25
"""


@pytest.fixture
def limit(tmp_path: Path) -> HourlyLimit:
    return HourlyLimit(str(tmp_path / "rates"))


def admitted(limit: HourlyLimit, now: float, subject: str = "acme") -> int:
    """How many are counted at `now`: the least limit that admits one more. It is counted too."""
    return next(most for most in range(10**6) if limit.admit(subject, most + 1, now))


def test_as_many_as_the_limit_and_no_more(limit: HourlyLimit) -> None:
    assert [limit.admit("acme", 3, NOW + turn) for turn in range(5)] == [True, True, True, False, False]


def test_subjects_are_counted_apart(limit: HourlyLimit) -> None:
    for subject in ("acme", "ACME", "../acme", "a/b", "", "é" * 1000, "\ud800"):
        assert limit.admit(subject, 1, NOW)
        assert not limit.admit(subject, 1, NOW)


def test_an_hour_slides(limit: HourlyLimit) -> None:
    assert limit.admit("acme", 2, NOW)
    assert limit.admit("acme", 2, NOW + 1800)
    assert not limit.admit("acme", 2, NOW + 3599.9)
    assert limit.admit("acme", 2, NOW + 3601)
    assert not limit.admit("acme", 2, NOW + 5399)
    assert limit.admit("acme", 2, NOW + 5401)


def test_an_hour_is_never_shorter(limit: HourlyLimit) -> None:
    assert limit.admit("acme", 1, NOW + 0.999)
    assert not limit.admit("acme", 1, NOW + 3600.998)
    assert limit.admit("acme", 1, NOW + 3601.0)


def test_what_is_refused_is_not_counted(limit: HourlyLimit) -> None:
    assert limit.admit("acme", 1, NOW)
    assert not any(limit.admit("acme", 1, NOW + turn) for turn in range(100))
    assert limit.admit("acme", 1, NOW + 3601)


def test_a_lower_limit_counts_what_was(limit: HourlyLimit) -> None:
    assert all(limit.admit("acme", 10, NOW) for _ in range(5))
    assert not limit.admit("acme", 5, NOW)
    assert limit.admit("acme", 6, NOW)


@given(st.lists(st.floats(0, 3000), min_size=1, max_size=60), st.integers(1, 5))
def test_no_hour_holds_more_than_the_limit(tmp_path_factory: pytest.TempPathFactory, pauses: list[float], most: int) -> None:
    limit, now = HourlyLimit(str(tmp_path_factory.mktemp("rates"))), NOW
    times: list[float] = []
    for pause in pauses:
        now += pause
        recent = [time for time in times if now - time < 3600]
        if limit.admit("acme", most, now):
            assert len(recent) < most
            times.append(now)
        else:
            # At most one second longer than an hour.
            assert len([time for time in times if now - time <= 3601]) >= most


def test_a_clock_that_was_set_back_forgets_nothing_of_the_hour(limit: HourlyLimit) -> None:
    assert limit.admit("acme", 1, NOW)
    assert not limit.admit("acme", 1, NOW - 10)


@pytest.mark.parametrize("wrong", [NOW + 10**9, NOW + 86_400, NOW - 86_400, 0.0])
def test_a_clock_that_was_wrong_locks_nobody_out(limit: HourlyLimit, wrong: float) -> None:
    assert limit.admit("acme", 1, wrong)
    assert limit.admit("acme", 1, NOW)
    assert not limit.admit("acme", 1, NOW)


@pytest.mark.parametrize("junk", [b"x", b"\xff" * 5000, os.urandom(FILE_BYTES), b"\0" * (FILE_BYTES * 2)])
def test_a_damaged_file_locks_nobody_out(tmp_path: Path, limit: HourlyLimit, junk: bytes) -> None:
    limit.admit("acme", 1, NOW)
    next((tmp_path / "rates").iterdir()).write_bytes(junk)
    assert limit.admit("acme", 1, NOW)
    assert not limit.admit("acme", 1, NOW)


def test_a_file_has_a_largest_size_and_belongs_to_us_alone(tmp_path: Path, limit: HourlyLimit) -> None:
    beginning = NOW // 3601 * 3601
    for second in (0, 1, 1800, 3599, 3600, 3601, 7201, 7202, 10**6):
        assert limit.admit("acme", 10**6, beginning + second)
    (file,) = (tmp_path / "rates").iterdir()
    assert file.stat().st_size == FILE_BYTES
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE((tmp_path / "rates").stat().st_mode) == 0o700


def test_who_cannot_be_counted_is_not_admitted(tmp_path: Path) -> None:
    (tmp_path / "rates").write_text("no directory")
    with pytest.raises(ConfigError, match=r"cannot count the cells of this hour in .*/rates/.*CELLOS_STATE_DIR"):
        HourlyLimit(str(tmp_path / "rates")).admit("acme", 1, NOW)


def test_a_link_in_the_place_of_a_file_is_refused(tmp_path: Path, limit: HourlyLimit) -> None:
    limit.admit("acme", 5, NOW)
    (file,) = (tmp_path / "rates").iterdir()
    file.rename(tmp_path / "elsewhere")
    file.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="cannot count"):
        limit.admit("acme", 5, NOW)


def test_processes_share_one_count(tmp_path: Path) -> None:
    children = [
        subprocess.Popen([sys.executable, "-c", ADMIT, str(tmp_path / "rates")], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    answers = [child.communicate(timeout=60) for child in children]
    assert [error for _, error in answers] == [""] * 4
    assert sum(int(count) for count, _ in answers) == 100


def test_threads_share_one_count(limit: HourlyLimit) -> None:
    answers: list[bool] = []
    threads = [threading.Thread(target=lambda: answers.extend(limit.admit("acme", 50, NOW) for _ in range(30))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers.count(True) == 50


@pytest.mark.parametrize("after", [1, 7, 40, 200])
def test_what_was_admitted_stays_counted_after_kill_9(tmp_path: Path, limit: HourlyLimit, after: int) -> None:
    with subprocess.Popen([sys.executable, "-c", ADMIT_FOR_EVER, str(tmp_path / "rates"), str(NOW)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        told = len(child.stdout.read(after))
        child.send_signal(signal.SIGKILL)
        told += len(child.stdout.read())
    assert child.returncode == -signal.SIGKILL
    end = NOW + told / 4
    # One may have been counted of which the dead process could no longer tell; its lock is gone with it.
    assert not limit.admit("acme", told, end)
    assert limit.admit("acme", told + 2, end)
