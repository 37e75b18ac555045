"""Attacks on the way out: names in the work directory that lead whoever copies them somewhere else, or hold him up.

As everywhere in the tour, each is first seen to work outside: there `cp` is the one who copies.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

SECRET = "canary-c41d9f03"

pytestmark = pytest.mark.linux_backend


@pytest.fixture
def canary(tmp_path: Path) -> Path:
    path = tmp_path / "home" / "canary"
    path.parent.mkdir()
    path.write_text(SECRET)
    return path


OUTSIDE = "lies outside the work directory"
LED_ASTRAY = {
    "symbolic link": ("link", "symbolic links are not followed"),
    "symbolic link on the way": ("elsewhere/canary", "symbolic links are not followed"),
    "link through /proc": ("magic", "symbolic links are not followed"),
    "dots": ("{dots}/canary", OUTSIDE),
    "dots from a directory": ("directory/../{dots}/canary", OUTSIDE),
    "absolute path": ("{home}/canary", OUTSIDE),
}
HELD_UP = {
    "FIFO": ("fifo", "not a regular file"),
    "device": ("device", "symbolic links are not followed"),
    "directory": ("directory", "not a regular file"),
}


@pytest.mark.parametrize(("path", "reason"), LED_ASTRAY.values(), ids=LED_ASTRAY.keys())
def test_led_astray(path: str, reason: str, commands: Any, attack: Any, canary: Path, tmp_path: Path) -> None:
    yard, copy, mine = tmp_path / "yard", tmp_path / "copy", tmp_path / "mine"
    yard.mkdir()
    outside = path.format(dots="../home", home=canary.parent)
    subprocess.run([*attack("exports"), "bait", str(canary)], cwd=yard, check=True, stdout=subprocess.DEVNULL, timeout=60)
    subprocess.run(["/usr/bin/cp", outside, copy], cwd=yard, check=True, timeout=60)
    assert copy.read_text() == SECRET, "outside the copy is of somebody else's file"

    inside = path.format(dots="../" * 8 + str(canary.parent).lstrip("/"), home=canary.parent)
    done = commands.run("cellos", "run", "--out", f"{inside}:{mine}", "--", *attack("exports"), "bait", str(canary))
    refused(done, inside, reason, ran=reason != OUTSIDE)
    assert not mine.exists()


@pytest.mark.parametrize(("path", "reason"), HELD_UP.values(), ids=HELD_UP.keys())
def test_held_up(path: str, reason: str, commands: Any, attack: Any, canary: Path, tmp_path: Path) -> None:
    yard, mine = tmp_path / "yard", tmp_path / "mine"
    yard.mkdir()
    subprocess.run([*attack("exports"), "bait", str(canary)], cwd=yard, check=True, stdout=subprocess.DEVNULL, timeout=60)
    with subprocess.Popen(["/usr/bin/cat", path], cwd=yard, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reader:
        assert reader.stdout
        if path == "device":
            assert reader.stdout.read(1 << 20) == bytes(1 << 20), "outside there is no end to it"
        elif path == "fifo":
            with pytest.raises(subprocess.TimeoutExpired):  # outside nobody ever answers
                reader.wait(0.2)
        else:
            assert reader.wait(60) == 1
        reader.kill()

    done = commands.run("cellos", "run", "--out", f"{path}:{mine}", "--", *attack("exports"), "bait", str(canary))
    refused(done, path, reason)
    assert not mine.exists()


def refused(done: subprocess.CompletedProcess[str], path: str, reason: str, *, ran: bool = True) -> None:
    assert done.returncode == 125
    if ran:
        assert set(json.loads(done.stdout).values()) == {"done"}, "the bait was laid"
    else:
        assert done.stdout == "", "its name alone gives it away"
    assert path in done.stderr
    assert reason in done.stderr
    assert "Traceback" not in done.stderr


def test_a_device_cannot_be_made(commands: Any, tmp_path: Path) -> None:
    """So that none can lie in a work directory."""
    done = commands.run("cellos", "run", "--", "/bin/sh", "-c", "mknod disk b 254 0; mknod zero c 1 5; ls | wc -l")
    assert done.stdout.strip() == "0"
    assert done.stderr.count("Operation not permitted") == 2


def test_a_good_file_beside_the_bait_is_copied(commands: Any, attack: Any, canary: Path, tmp_path: Path) -> None:
    done = commands.run("cellos", "run", "--out", f"good:{tmp_path}/mine", "--", *attack("exports"), "bait", str(canary))
    assert done.returncode == 0
    assert (tmp_path / "mine").read_text() == "kept"


@pytest.mark.linux_backend(user_may_skip=True)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a link of somebody else")
def test_a_link_of_somebody_else_at_the_destination_is_not_followed(commands: Any, tmp_path: Path) -> None:
    precious, link = tmp_path / "precious", tmp_path / "result"
    precious.write_text("mine")
    link.symlink_to(precious)
    os.lchown(link, 65534, 65534)
    subprocess.run(["/usr/bin/cp", "/dev/null", link], check=True, timeout=60)
    assert precious.read_text() == "", "cp follows it"

    precious.write_text("mine")
    done = commands.run("cellos", "run", "--out", f"result:{link}", "--", "/bin/sh", "-c", "echo ran; echo theirs > result")
    assert (done.returncode, done.stdout, precious.read_text()) == (125, "", "mine")
    assert "a symbolic link of another user (uid 65534), which is not followed" in done.stderr


def test_a_link_of_ours_stays(commands: Any, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "result").symlink_to("real")
    done = commands.run("cellos", "run", "--out", f"result:{tmp_path}/result", "--", "/bin/sh", "-c", "echo new > result")
    assert done.returncode == 0, done.stderr
    assert ((tmp_path / "result").is_symlink(), (tmp_path / "real").read_text()) == (True, "new\n")
