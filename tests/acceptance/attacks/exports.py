"""Bait in the work directory: names that lead whoever copies them out of it, or hold him up."""

from __future__ import annotations

import os

from attempt import main, outcome


def bait(outside: str) -> object:
    """`outside` is a file of the host. Made in the current directory."""
    os.mkdir("directory")
    with open("good", "w") as file:
        file.write("kept")
    return {
        "link": outcome(os.symlink, outside, "link"),
        "linked directory": outcome(os.symlink, os.path.dirname(outside), "elsewhere"),
        "magic link": outcome(os.symlink, "/proc/self/root" + outside, "magic"),
        "fifo": outcome(os.mkfifo, "fifo"),
        "device": outcome(os.symlink, "/dev/zero", "device"),
    }


if __name__ == "__main__":
    main(globals())
