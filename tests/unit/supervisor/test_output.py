from __future__ import annotations

import base64
import itertools
import os
import stat
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellos.errors import ConfigError, EventSinkError, HostBackendError
from cellos.supervisor.output import MASK, PIECE_BYTES, Masker, OutputRecorder

SECRETS = ("s3cret!", "s3cret!-longer", "hunter2hunter3", "ünï-cödé")
# Few letters, so that beginnings, ends and overlaps of secrets are met all the time.
TEXT = st.text("ab", min_size=4, max_size=7)
DATA = st.text("abc", max_size=60).map(str.encode)


def pieces(data: bytes, cuts: list[int]) -> list[bytes]:
    bounds = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    return [data[begin:end] for begin, end in itertools.pairwise(bounds)]


def masked(secrets: tuple[str, ...] | list[str], data: list[bytes]) -> bytes:
    masker = Masker(secrets)
    return b"".join([*map(masker.feed, data), masker.finish()])


CUTS = st.lists(st.integers(0, 200), max_size=8)


class TestMasker:
    @given(st.lists(TEXT, max_size=3), DATA, CUTS)
    def test_it_does_not_matter_how_the_output_comes(self, secrets: list[str], data: bytes, cuts: list[int]) -> None:
        assert masked(secrets, pieces(data, cuts)) == masked(secrets, [data])

    @given(st.lists(TEXT, min_size=1, max_size=3), DATA, CUTS)
    def test_no_secret_gets_through(self, secrets: list[str], data: bytes, cuts: list[int]) -> None:
        shown = masked(secrets, pieces(data, cuts))
        assert not any(secret.encode() in shown for secret in secrets)

    @given(st.lists(st.text("abé", max_size=3), max_size=3), st.binary(max_size=60), CUTS)
    def test_without_secrets_nothing_is_changed(self, short: list[str], data: bytes, cuts: list[int]) -> None:
        """Three letters are no secret: they would blank out every other word."""
        assert masked(short, pieces(data, cuts)) == data

    @given(st.binary(max_size=60), CUTS)
    def test_nor_where_no_secret_is_printed(self, data: bytes, cuts: list[int]) -> None:
        assert masked(["not in there: \N{SNOWMAN}"], pieces(data, cuts)) == data

    @pytest.mark.parametrize("secret", SECRETS)
    def test_at_every_place_where_it_can_be_cut(self, secret: str) -> None:
        raw = secret.encode()
        for cut in range(len(raw) + 1):
            assert masked(SECRETS, [b"<" + raw[:cut], raw[cut:] + b">"]) == b"<***>"
        assert masked(SECRETS, [bytes([byte]) for byte in b"<" + raw + b">"]) == b"<***>"

    def test_of_two_that_begin_alike_the_longer_goes_whole(self) -> None:
        assert masked(SECRETS, [b"s3cret!", b"-longer"]) == MASK
        assert masked(SECRETS, [b"s3cret!", b"-longest"]) == b"***-longest"
        assert masked(SECRETS, [b"s3cret!"]) == MASK, "what it waited for did not come"

    def test_only_what_could_be_a_secret_waits(self) -> None:
        masker = Masker(["s3cret!"])
        assert masker.feed(b"plain text s3c") == b"plain text "
        assert masker.feed(b"ond try") == b"s3cond try"
        assert masker.finish() == b""

    def test_a_secret_may_be_bytes_that_are_no_text(self) -> None:
        """Variables are bytes, which Python keeps as lone surrogates."""
        assert masked([os.fsdecode(b"\xff\xfesecret")], [b"<\xff\xfesec", b"ret>"]) == b"<***>"

    def test_a_long_secret_costs_no_more_than_a_short_one(self) -> None:
        """It is looked for by its first byte, not by each of its beginnings: this would take minutes."""
        secret = "".join(f"{number:08}" for number in range(1 << 15))
        assert masked([secret], [b"." * (1 << 16)] * 16) == b"." * (1 << 20)


class Kept:
    """The events that a recorder reports."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int, dict[str, Any], bool]] = []
        self.fail = False

    def emit(self, stream: str, offset: int, content: dict[str, Any], truncated: bool) -> None:
        if self.fail:
            raise EventSinkError("full")
        self.events.append((stream, offset, content, truncated))

    def recorder(
        self, directory: Path | None = None, *, most: int = 1 << 20, secrets: tuple[str, ...] = (), events: bool = True
    ) -> OutputRecorder:
        place = None if directory is None else str(directory)
        return OutputRecorder("run-1", directory=place, most_bytes=most, secrets=secrets, emit=self.emit if events else None)

    def bytes_of(self, stream: str) -> bytes:
        """What the events say, after a look at their offsets."""
        told = b""
        for of, offset, content, _ in self.events:
            if of == stream:
                assert offset == len(told)
                assert len(content) == 1
                told += content["text"].encode() if "text" in content else base64.b64decode(content["base64"])
        return told

    def truncated(self, stream: str) -> list[bool]:
        return [truncated for of, _, _, truncated in self.events if of == stream]


@pytest.fixture
def kept() -> Kept:
    return Kept()


class TestEvents:
    def test_a_line_is_an_event_when_it_is_whole(self, kept: Kept) -> None:
        recorder = kept.recorder()
        recorder.write("stdout", b"one\ntw")
        recorder.write("stderr", b"oops\n")
        recorder.write("stdout", b"o\nthree")
        assert kept.events == [
            ("stdout", 0, {"text": "one\n"}, False),
            ("stderr", 0, {"text": "oops\n"}, False),
            ("stdout", 4, {"text": "two\n"}, False),
        ]
        recorder.close()
        recorder.close()
        assert kept.events[3:] == [("stdout", 8, {"text": "three"}, False)]

    def test_what_is_no_text_is_base64(self, kept: Kept) -> None:
        recorder = kept.recorder()
        recorder.write("stdout", b"\xff\x00\n")
        recorder.close()
        assert kept.events == [("stdout", 0, {"base64": "/wAK"}, False)]

    def test_long_lines_come_in_pieces(self, kept: Kept) -> None:
        recorder = kept.recorder()
        recorder.write("stdout", b"x" * (2 * PIECE_BYTES + 5))
        recorder.close()
        assert [len(content["text"]) for _, _, content, _ in kept.events] == [PIECE_BYTES, PIECE_BYTES, 5]
        assert [offset for _, offset, _, _ in kept.events] == [0, PIECE_BYTES, 2 * PIECE_BYTES]

    @given(st.binary(max_size=300), CUTS, st.integers(0, 200))
    def test_offsets_meet_and_the_end_is_told_once(self, data: bytes, cuts: list[int], most: int) -> None:
        kept = Kept()
        recorder = kept.recorder(most=most)
        for piece in pieces(data, cuts):
            recorder.write("stdout", piece)
            recorder.write("stderr", piece[:1])
        recorder.close()
        assert kept.bytes_of("stdout") == data[:most]
        assert kept.truncated("stdout").count(True) == (len(data) > most)
        assert kept.truncated("stdout")[-1:] == ([True] if len(data) > most else [False] if data else [])

    def test_nothing_is_said_of_nothing(self, kept: Kept) -> None:
        recorder = kept.recorder()
        recorder.write("stdout", b"")
        recorder.close()
        assert kept.events == []

    def test_a_cap_that_is_just_reached_cuts_nothing(self, kept: Kept) -> None:
        recorder = kept.recorder(most=4)
        recorder.write("stdout", b"abcd")
        recorder.close()
        assert kept.events == [("stdout", 0, {"text": "abcd"}, False)]

    def test_what_comes_after_the_cap_is_told_without_content(self, kept: Kept) -> None:
        recorder = kept.recorder(most=5)
        recorder.write("stdout", b"full\n")
        assert kept.events == [("stdout", 0, {"text": "full\n"}, False)]
        for _ in range(3):
            recorder.write("stdout", b"more\n")
        recorder.close()
        assert kept.events[1:] == [("stdout", 5, {"text": ""}, True)]

    def test_the_cap_counts_what_is_shown(self, kept: Kept) -> None:
        recorder = kept.recorder(most=5, secrets=("s3cret!",))
        recorder.write("stdout", b"a s3cret!")
        recorder.close()
        assert kept.events == [("stdout", 0, {"text": "a ***"}, False)]

    def test_a_piece_that_could_be_half_a_secret_waits(self, kept: Kept) -> None:
        recorder = kept.recorder(secrets=("s3\ncret",))
        recorder.write("stdout", b"a s3\n")
        assert kept.events == []
        recorder.write("stdout", b"cret\n")
        recorder.close()
        assert kept.bytes_of("stdout") == b"a ***\n"

    def test_a_sink_that_refuses_is_the_callers_matter(self, kept: Kept, tmp_path: Path) -> None:
        recorder = kept.recorder(tmp_path)
        recorder.write("stdout", b"half a line")
        kept.fail = True
        with pytest.raises(EventSinkError):
            recorder.write("stderr", b"x\n")
        descriptors = list(recorder._files.values())
        with pytest.raises(EventSinkError):
            recorder.close()
        for descriptor in descriptors:
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(descriptor)


class TestFiles:
    def test_they_hold_what_was_written_and_are_private(self, kept: Kept, tmp_path: Path) -> None:
        umask = os.umask(0)
        try:
            recorder = kept.recorder(tmp_path, secrets=("s3cret!",), events=False)
        finally:
            os.umask(umask)
        recorder.write("stdout", b"a s3c")
        recorder.write("stderr", b"\xff")
        recorder.write("stdout", b"ret! b")
        recorder.close()
        assert (tmp_path / "run-1.stdout").read_bytes() == b"a *** b"
        assert (tmp_path / "run-1.stderr").read_bytes() == b"\xff"
        assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in sorted(os.listdir(tmp_path))] == [0o600, 0o600]
        assert kept.events == []

    def test_a_command_that_wrote_nothing_has_empty_ones(self, kept: Kept, tmp_path: Path) -> None:
        kept.recorder(tmp_path).close()
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == {"run-1.stdout": b"", "run-1.stderr": b""}

    def test_they_end_at_the_cap_each(self, kept: Kept, tmp_path: Path) -> None:
        recorder = kept.recorder(tmp_path, most=3)
        recorder.write("stdout", b"abcdef")
        recorder.write("stderr", b"ab")
        recorder.close()
        assert (tmp_path / "run-1.stdout").read_bytes() == b"abc"
        assert (tmp_path / "run-1.stderr").read_bytes() == b"ab"
        assert (kept.truncated("stdout"), kept.truncated("stderr")) == ([True], [False])

    def test_files_and_events_say_the_same(self, kept: Kept, tmp_path: Path) -> None:
        recorder = kept.recorder(tmp_path, secrets=SECRETS)
        for piece in (b"one\ns3c", b"ret", b"!-lon", b"ger\n\xff\n", b"the end"):
            recorder.write("stdout", piece)
        recorder.close()
        assert kept.bytes_of("stdout") == (tmp_path / "run-1.stdout").read_bytes() == b"one\n***\n\xff\nthe end"

    @pytest.mark.parametrize("run_id", ["../../etc/passwd", "a/b", "ünï"])
    def test_a_run_id_never_leads_elsewhere(self, tmp_path: Path, run_id: str) -> None:
        OutputRecorder(run_id, directory=str(tmp_path), most_bytes=1, secrets=(), emit=None).close()
        names = sorted(os.listdir(tmp_path))
        assert len(names) == 2
        assert [name.rpartition(".")[2] for name in names] == ["stderr", "stdout"]

    @pytest.mark.parametrize(
        ("make", "text"),
        [
            (lambda place: None, r"CELLOS_OUTPUT_DIR: cannot make .*/run-1.stdout: No such file or directory \(os error 2\)"),
            (lambda place: place.touch(), r"CELLOS_OUTPUT_DIR: cannot make .*/run-1.stdout: Not a directory \(os error 20\)"),
        ],
    )
    def test_a_directory_that_is_none(self, kept: Kept, tmp_path: Path, make: Any, text: str) -> None:
        make(tmp_path / "out")
        with pytest.raises(ConfigError, match=text):
            kept.recorder(tmp_path / "out")

    def test_nothing_is_overwritten_and_no_link_followed(self, kept: Kept, tmp_path: Path) -> None:
        (tmp_path / "precious").write_text("mine")
        (tmp_path / "run-1.stderr").symlink_to(tmp_path / "precious")
        open_before = os.listdir("/proc/self/fd")
        with pytest.raises(ConfigError, match=r"run-1.stderr: File exists \(os error 17\)"):
            kept.recorder(tmp_path)
        assert os.listdir("/proc/self/fd") == open_before
        assert (tmp_path / "precious").read_text() == "mine"

    def test_a_full_disk_is_an_error(self, kept: Kept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        recorder = kept.recorder(tmp_path)

        def write(descriptor: int, data: bytes) -> int:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "write", write)
        with pytest.raises(HostBackendError) as caught:
            recorder.write("stdout", b"x")
        monkeypatch.undo()
        recorder.close()
        assert caught.value.text == "CELLOS_OUTPUT_DIR: cannot keep the command's output: No space left on device (os error 28)"
