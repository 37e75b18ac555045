import io
import json
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from cellos.cli import events as verb
from cellos.cli import timeline
from cellos.cli.events import check, find, print_text
from cellos.core.events import Event, canonical_bytes, parse_event
from cellos.core.evidence.sign import Signer
from cellos.errors import ConfigError, EvidenceError

GOLDEN = Path(__file__).parents[2] / "golden" / "events"
RUN = GOLDEN / "run.jsonl"
TYPES = [*timeline.DESCRIBED, "other\x1b[2J.type", ""]
MEMBERS = [
    "argv",
    "backend",
    "enforced",
    "limits",
    "unbounded",
    "program",
    "argc",
    "spawnError",
    "signal",
    "exitCode",
    "receipt",
    "outcome",
]
MEMBERS += ["capEff", "capBnd", "privileged", "noNewPrivs", "seccompMode", "egressRuleCount", "currentDigest", "identity", "violations"]
MEMBERS += ["recommendedRemovals", "exercisedEgressConnections", "exercisedSecretCount", "declaredSecretCount", "base64", "truncated"]
MEMBERS += ["reason", "residueClass", "residueException", "ttlSeconds", "new\x9b"]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["kind", "destination", "memoryBytes", "\x1b"]), inner, max_size=3)
    ),
    max_leaves=6,
)


def call(*arguments: str | Path, text: bytes = b"") -> Result:
    return CliRunner().invoke(verb.events, [str(each) for each in arguments], input=text)


def program(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "cellos.cli.main", "events", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, check=False, **options)


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.jsonl")), ids=lambda path: path.stem)
def test_golden_records(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(GOLDEN)
    result = call(path.name)
    assert f"{result.stdout}exit {result.exit_code}\n" == path.with_suffix(".txt").read_text()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*.jsonl")), ids=lambda path: path.stem)
def test_json_says_the_same(path: Path) -> None:
    result = call(path, "--json")
    objects = [json.loads(line) for line in result.stdout.splitlines()]
    runs = [each for each in objects if "verdict" in each]
    verified = all(run["verdict"]["state"] == "verified" for run in runs) and len(runs) == len(objects)
    assert result.exit_code == (0 if verified else 1)
    recorded = [json.loads(line) for line in path.read_bytes().splitlines() if _is_json(line)]
    assert sorted(map(json.dumps, (event for run in runs for event in run["events"]))) == sorted(map(json.dumps, recorded))


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True


def test_json_of_one_run() -> None:
    (line,) = call(RUN, "--json").stdout.splitlines()
    run = json.loads(line)
    del run["events"]
    first, last = _ends()
    assert run.pop("verdict") == {
        "state": "verified",
        "count": 6,
        "first": first,
        "last": last,
        "startChecked": True,
        "signature": "none",
        "signers": [],
        "fault": None,
    }
    assert run == {"cellId": "demo-build", "runId": "run-0042", "specId": "demo-build", "specHash": "5e" * 32}


def _ends() -> tuple[str, str]:
    lines = RUN.read_bytes().splitlines()
    return sha256(lines[0]).hexdigest(), sha256(lines[-1]).hexdigest()


def test_json_names_the_faults_of_lines_that_belong_to_nobody() -> None:
    *_, last = call(GOLDEN / "truncated.jsonl", "--json").stdout.splitlines()
    (fault,) = json.loads(last)["faults"]
    assert (fault["kind"], fault["line"]) == ("truncated", 6)


def test_events_of_no_run_are_counted(tmp_path: Path) -> None:
    loose = Event(id="1", source="s", type="dev.cellos.events.cell.policy.v1.rejected", data={"specId": "spec"})
    path = tmp_path / "events.jsonl"
    path.write_bytes(RUN.read_bytes() + canonical_bytes(loose) + b"\n")
    assert call(path).stdout.endswith("\nbeside the runs: 1 events of no run, not chained\n")
    result = call(path, "--json")
    assert (result.exit_code, json.loads(result.stdout.splitlines()[-1])) == (0, {"faults": [], "eventsOfNoRun": 1})


def test_of_a_file_that_is_no_record_the_first_faults_are_told(tmp_path: Path) -> None:
    path = tmp_path / "noise"
    path.write_bytes(b"\xff\n" * 12)
    result = call(path)
    first, *faults, last = result.stdout.splitlines()
    assert (result.exit_code, first, last) == (1, f"{path}: 12 lines belong to no run", "  … and 2 more")
    assert [line.split(":")[0] for line in faults] == [f"  line {number}" for number in range(1, 11)]
    assert len(json.loads(call(path, "--json").stdout)["faults"]) == 12


class TestHead:
    def test_right_and_wrong(self) -> None:
        assert call(RUN, "--head", _ends()[1]).exit_code == 0
        result = call(RUN, "--head", "00" * 32)
        assert result.exit_code == 1
        assert "chain BROKEN: line 6: edited: the last event has the digest" in result.stdout

    def test_it_shows_a_tail_that_is_gone(self) -> None:
        result = call(GOLDEN / "unfinished.jsonl", "--head", _ends()[1])
        assert "chain BROKEN: line 3: truncated: the record stops after this line" in result.stdout

    @pytest.mark.parametrize("head", ["", "5cff055b79a2", "G" * 64, "AB" * 32])
    def test_it_is_a_whole_digest(self, head: str) -> None:
        result = call(RUN, "--head", head)
        assert result.exit_code == 2
        assert "64 hex digits" in result.stderr

    def test_it_is_of_one_run(self) -> None:
        result = call(GOLDEN / "interleaved.jsonl", "--head", "00" * 32)
        assert "this record has 2" in str(result.exception)


class TestSource:
    def test_standard_input(self) -> None:
        expected = RUN.with_suffix(".txt").read_text().removesuffix("exit 0\n").encode()
        assert program("-", input=RUN.read_bytes()).stdout == expected
        with RUN.open("rb") as file:
            assert program("-", stdin=file).stdout == expected

    def test_a_closed_standard_input_is_empty(self) -> None:
        result = subprocess.run(["sh", "-c", f"exec {sys.executable} -m cellos.cli.main events - <&-"], capture_output=True, check=False)
        assert result.returncode == 1
        assert result.stderr == b"cellos: evidence: no run in standard input: it is empty\n"

    @pytest.mark.parametrize(
        ("path", "why"),
        [("/nowhere/x.jsonl", "No such file or directory"), (str(GOLDEN) + "/", "Is a directory"), ("/nul\0byte", "embedded null byte")],
    )
    def test_unreadable(self, path: str, why: str) -> None:
        result = call(path)
        assert isinstance(result.exception, EvidenceError)
        assert str(result.exception).startswith("evidence: cannot read /")
        assert why in str(result.exception)

    def test_nothing_of_a_run(self, tmp_path: Path) -> None:
        path = tmp_path / "x.jsonl"
        path.write_bytes(canonical_bytes(Event(id="1", source="s", type="dev.cellos.events.cell.authz.v1.rejected")) + b"\n")
        assert str(call(path).exception) == f"evidence: no run in {path}: none of its events belongs to one"

    def test_names(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        environment = {"CELLOS_STATE_DIR": str(tmp_path / "state")}
        with pytest.raises(EvidenceError, match=r"no run is recorded; `cellos run -- COMMAND` makes one"):
            find(None, environment)
        with pytest.raises(EvidenceError, match=r"no file x, and no run of that name$"):
            find("x", environment)
        assert os.listdir(tmp_path) == []  # to look makes nothing
        (tmp_path / "state").mkdir(mode=0o700)
        with pytest.raises(EvidenceError, match=r"no run is recorded in .*; `cellos run -- COMMAND` makes one"):
            find(None, environment)
        evidence = tmp_path / "state" / "evidence"
        evidence.mkdir(mode=0o700)
        for age, name in enumerate(["019b-2", "019a-1", "019a-12", "zzz"]):
            path = evidence / f"{name}.jsonl"
            path.touch()
            os.utime(path, (1000 - age, 1000 - age))
        (evidence / "019a-1.tmp").touch()
        assert find(None, environment) == str(evidence / "019b-2.jsonl")
        assert find("019b", environment) == str(evidence / "019b-2.jsonl")
        assert find("019a-1", environment) == str(evidence / "019a-1.jsonl")
        with pytest.raises(EvidenceError, match="019a is the beginning of several runs: 019a-1, 019a-12"):
            find("019a", environment)
        with pytest.raises(EvidenceError, match="no file 02, and no run of that name in "):
            find("02", environment)
        (tmp_path / "zzz").touch()
        assert find("zzz", environment) == "zzz"
        assert find("./zz", environment) == "./zz"


class TestLongRecords:
    def test_a_line_without_end_is_not_kept(self) -> None:
        """Only a beginning is read into memory; the lines after it are found again."""
        good = RUN.read_bytes()
        first, _, rest = good.partition(b"\n")
        for length in (1 << 20, (1 << 20) + 1, (1 << 20) + 2, (1 << 20) + 3, 3 << 20):
            file = io.BytesIO(first + b"\n" + b"x" * length + b"\n" + rest)
            record = check(file)
            assert [(fault.kind, fault.line) for fault in record.report.faults] == [("malformed", 2)]
            assert record.report.runs[0].state == "verified"
            output = io.StringIO()
            print_text(record, file, output, where="x")
            assert "destroyed      succeeded" in output.getvalue()

    def test_a_line_without_end_at_the_end(self) -> None:
        record = check(io.BytesIO(RUN.read_bytes() + b"x" * (2 << 20)))
        assert [(fault.kind, fault.line) for fault in record.report.faults] == [("truncated", 7)]


class TestHostileText:
    @given(st.text())
    def test_visible_is_printable(self, text: str) -> None:
        assert timeline.visible(text).isprintable()
        if text.isprintable() and len(text) <= timeline.LONGEST_TEXT:
            assert timeline.visible(text) == text

    @given(st.sampled_from(TYPES), st.none() | st.text(max_size=5), st.dictionaries(st.sampled_from(MEMBERS), VALUES))
    def test_any_event_becomes_printable_lines(self, kind: str, time: str | None, data: dict[str, Any]) -> None:
        event = Event(id="x", source="s", type=kind, time=time, data=data)
        lines = list(timeline.event_lines(event, 0))
        assert lines
        assert all(line.isprintable() for line in lines)

    def test_the_terminal_sees_no_control_character(self) -> None:
        shown = call(GOLDEN / "hostile.jsonl").stdout
        assert r"\x1b]0;owned\x07" in shown
        assert all(line.isprintable() for line in shown.splitlines())


class TestTimes:
    @pytest.mark.parametrize(
        ("time", "shown"),
        [
            ("2026-03-01T10:00:00+00:00", "+0.0 ms"),
            ("2026-03-01T10:00:00.012300Z", "+12.3 ms"),
            ("2026-03-01T09:59:59.999Z", "-1.0 ms"),
            ("2026-03-01T10:01:00.5Z", "+60.500 s"),
            ("yesterday", "?"),
            (None, "?"),
        ],
    )
    def test_relative_to_the_first_event(self, time: str | None, shown: str) -> None:
        start = timeline.start_of(Event(id="x", source="s", type="t", time="2026-03-01T10:00:00.000000000+00:00"))
        (line,) = timeline.event_lines(Event(id="x", source="s", type="thing", time=time), start)
        assert line.split("thing")[0].strip() == shown


def test_colours_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    def shown() -> str:
        output = Terminal()
        with RUN.open("rb") as file:
            print_text(check(file), file, output, where="x")
        return output.getvalue()

    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\x1b[32mchain verified" in shown()
    monkeypatch.setenv("NO_COLOR", "1")
    assert "\x1b" not in shown()


class TestSignatures:
    """The golden run, signed; `keys` and `shared` are the files to check it with."""

    @pytest.fixture
    def signed(self, tmp_path: Path) -> Path:
        return self._record(tmp_path / "signed.jsonl", Signer("k1", "ed25519", bytes(range(32))))

    @pytest.fixture
    def keys(self, tmp_path: Path) -> Path:
        path = tmp_path / "keys.json"
        path.write_text('{"k1": "A6EHv_POEL4dcN0Y50vAmWfk1jCbpQ1fHdyGZBJVMbg"}')
        return path

    @staticmethod
    def _record(path: Path, signer: Signer) -> Path:
        path.write_bytes(b"".join(signer.wrap(parse_event(line), line) + b"\n" for line in RUN.read_bytes().splitlines()))
        return path

    def test_who_signed(self, signed: Path, keys: Path) -> None:
        result = call(signed, "--keys", keys, "--require-signed")
        header, *_, verdict = result.stdout.splitlines()
        assert header.endswith(", signed by k1, verified")
        assert verdict.startswith("chain verified: 6 events")
        assert result.exit_code == 0

    def test_as_json(self, signed: Path, keys: Path) -> None:
        verdict = json.loads(call(signed, "--keys", keys, "--json").stdout)["verdict"]
        assert (verdict["state"], verdict["signature"], verdict["signers"]) == ("verified", "verified", ["k1"])
        verdict = json.loads(call(signed, "--json").stdout)["verdict"]
        assert (verdict["state"], verdict["signature"], verdict["signers"]) == ("verified", "unchecked", ["k1"])

    def test_shared_keys(self, tmp_path: Path, keys: Path) -> None:
        record = self._record(tmp_path / "mac.jsonl", Signer("k1", "hmac-sha256", b"cellos-hmac-demo-key"))
        shared = tmp_path / "shared.json"
        shared.write_text('{"k1": "Y2VsbG9zLWhtYWMtZGVtby1rZXk"}')
        assert "signed by k1, verified" in call(record, "--keys", keys, "--hmac-keys", shared).stdout
        assert "signature BROKEN: line 1: unknown key: " in call(record, "--keys", keys).stdout

    def test_a_change_to_the_last_event(self, signed: Path, keys: Path) -> None:
        signed.write_bytes(signed.read_bytes().replace(b'"outcome":"succeeded"', b'"outcome":"failed"'))
        result = call(signed, "--keys", keys)
        assert "signed by k1, but that does not hold" in result.stdout
        assert "signature BROKEN: line 6: bad signature: signed event envelope: ed25519 verify failed: " in result.stdout
        assert result.exit_code == 1
        assert "chain verified" in call(signed).stdout, "this is what the keys are for"

    def test_an_unsigned_record(self, keys: Path) -> None:
        result = call(RUN, "--keys", keys)
        assert (result.stdout.splitlines()[0].endswith(", NOT SIGNED"), result.exit_code) == (True, 0)
        result = call(RUN, "--keys", keys, "--require-signed")
        assert "signature BROKEN: line 1: unsigned: CELLOS_EVENT_REQUIRE_SIGNED=1 but payload is not a Signed" in result.stdout
        assert result.exit_code == 1

    def test_one_event_without_a_chain(self, keys: Path) -> None:
        result = call(GOLDEN / "signed-wrapper.jsonl", "--keys", keys)
        assert "no chain: 1 event without a link to the one before, so only the signature of each could be verified" in result.stdout
        assert result.exit_code == 1

    def test_variables_stand_for_options(self, signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELLOS_EVENT_VERIFY_KEYS_PATH", f" {keys} ")
        monkeypatch.setenv("CELLOS_EVENT_VERIFY_HMAC_KEYS_PATH", " ")
        assert "signed by k1, verified" in call(signed).stdout
        assert call(RUN).exit_code == 0
        monkeypatch.setenv("CELLOS_EVENT_REQUIRE_SIGNED", " Yes ")
        assert (call(signed).exit_code, call(RUN).exit_code) == (0, 1)

    def test_an_option_is_stronger_than_its_variable(self, signed: Path, keys: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CELLOS_EVENT_VERIFY_KEYS_PATH", "/nowhere")
        assert "signed by k1, verified" in call(signed, "--keys", keys).stdout
        monkeypatch.setenv("CELLOS_EVENT_REQUIRE_SIGNED", "no")
        assert call(RUN, "--keys", keys).exit_code == 0

    def test_to_require_signatures_takes_keys(self, signed: Path) -> None:
        result = call(signed, "--require-signed")
        assert isinstance(result.exception, ConfigError)
        assert "give --keys FILE or CELLOS_EVENT_VERIFY_KEYS_PATH" in str(result.exception)

    def test_keys_that_cannot_be_read(self, signed: Path, keys: Path) -> None:
        link = keys.with_name("link")
        link.symlink_to(keys)
        done = program(signed, "--keys", link)
        assert (done.returncode, done.stdout) == (1, b"")
        assert b"trust verify keys: cannot open " in done.stderr
        assert b"Traceback" not in done.stderr
