"""Where events go and in which form: redacted, signed, in a file, to NATS, among the dead letters."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import re
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nats
import pytest
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cellos.testing.nats_server import NatsServer

SEED = bytes(range(32))
KEY = Ed25519PrivateKey.from_private_bytes(SEED).public_key()
ENVELOPE = ["specversion", "id", "source", "type", "datacontenttype", "data", "time", "traceparent"]
ED25519 = {
    "CELLOS_EVENT_SIGNING": " Ed25519 ",
    "CELLOS_EVENT_SIGNING_KID": "k1",
    "CELLOS_EVENT_SIGNING_KEY_BASE64": base64.urlsafe_b64encode(SEED).decode(),
}
HMAC = {
    "CELLOS_EVENT_SIGNING": "hmac",
    "CELLOS_EVENT_SIGNING_KID": "k2",
    "CELLOS_EVENT_SIGNING_KEY_BASE64": "Y2VsbG9zLWhtYWMtZGVtby1rZXk",
}
REFUSED_BY_FULL = "event sink: sink full: /dev/full (No space left on device (os error 28))"


def signed_bytes(event: dict[str, Any]) -> bytes:
    """What a verifier computes from an event, however it was written: the eight members in order, `data` sorted."""
    members = {name: json.loads(json.dumps(event[name], sort_keys=True)) for name in ENVELOPE}
    return json.dumps(members, ensure_ascii=False, separators=(",", ":")).encode()


def unwrapped(line: str | bytes) -> dict[str, Any]:
    """The event in a signed line. The signature holds."""
    wrapper = json.loads(line)
    assert list(wrapper) == ENVELOPE
    assert wrapper["type"] == "dev.cellos.events.signed_envelope.v1"
    assert wrapper["source"] == "/cellos-supervisor/event-signing"
    envelope = wrapper["data"]
    assert set(envelope) == {"event", "signerKid", "algorithm", "signature"}
    event: dict[str, Any] = envelope["event"]
    assert (wrapper["id"], wrapper["time"], wrapper["traceparent"]) == (event["id"], event["time"], event["traceparent"])
    assert "=" not in envelope["signature"]
    signature = base64.urlsafe_b64decode(envelope["signature"] + "==")
    if envelope["algorithm"] == "ed25519":
        assert envelope["signerKid"] == "k1"
        KEY.verify(signature, signed_bytes(event))
    else:
        assert (envelope["algorithm"], envelope["signerKid"]) == ("hmac-sha256", "k2")
        assert hmac.digest(b"cellos-hmac-demo-key", signed_bytes(event), hashlib.sha256) == signature
    return event


class TestForm:
    def test_of_a_line(self, site: Any) -> None:
        site.run("sh", "-c", "exit 3", "é\n\u2028", correlation={"labels": {"b": "\n", "a": "é"}, "tenantId": "t"})
        raw = site.jsonl.read_bytes()
        assert raw.endswith(b"\n")
        assert b"\r" not in raw
        assert len(raw.decode().split("\n")) == len(site.events) + 1
        for line in raw.split(b"\n")[:-1]:
            event = json.loads(line)
            assert list(event) == ENVELOPE
            assert line == signed_bytes(event), "compact, sorted, UTF-8"
            assert (event["specversion"], event["source"], event["datacontenttype"]) == ("1.0", "cellos-supervisor", "application/json")
            assert event["traceparent"] is None
            assert re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", event["id"])
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{3}|\.\d{6}|\.\d{9})?\+00:00", event["time"])
            correlation = event["data"].get("correlation")
            unset = {"platform": None, "externalRunId": None, "externalJobId": None}
            if correlation is not None:
                assert correlation == {"labels": {"b": "\n", "a": "é"}, "tenantId": "t", **unset}
        assert {event["data"].get("tenantId") for event in site.events} == {None, "t"}
        assert len({event["id"] for event in site.events}) == len(site.events)

    def test_a_file_is_appended_to_and_private(self, site: Any) -> None:
        site.run("true")
        first = site.jsonl.read_bytes()
        site.run("true")
        assert site.jsonl.read_bytes().startswith(first)
        assert len(site.events) == 2 * first.count(b"\n")
        assert stat.S_IMODE(site.jsonl.stat().st_mode) == 0o600

    def test_a_directory_for_it_is_not_made(self, site: Any) -> None:
        missing = str(site.place / "no/events.jsonl")
        done = site.run("true", variables={"CELL_OS_JSONL_EVENTS": missing})
        site.refused(done, f"event sink: jsonl open {missing}: No such file or directory (os error 2)")


class TestRedaction:
    @pytest.mark.parametrize(
        ("setting", "gone"),
        [
            ("argv", {"argv"}),
            ("defaults", {"argv", "reason"}),
            (" DEFAULTS ", {"argv", "reason"}),
            ("program, ,sourcePath", {"program"}),
            ("Argv", set()),
            ("", set()),
            (" ", set()),
            ("defaults,program", {"argv", "reason", "program"}),
        ],
    )
    def test_members_by_their_name(self, site: Any, setting: str, gone: set[str]) -> None:
        done = site.run("/bin/sh", "-c", "exit 3", "--password=hunter2", variables={"CELLOS_REDACT_EVENT_FIELDS": setting})
        assert done.returncode == 1
        shown = {
            "argv": site.data("command.v1.completed")["argv"],
            "reason": site.data("lifecycle.v1.destroyed")["reason"],
            "program": site.data("observability.v1.process_spawned")["program"],
        }
        clear = {
            "argv": ["/bin/sh", "-c", "exit 3", "--password=hunter2"],
            "reason": "command exited with status 3",
            "program": "/bin/sh",
        }
        redacted = {"argv": ["[redacted]"], "reason": "[redacted]", "program": "[redacted]"}
        assert shown == {name: (redacted if name in gone else clear)[name] for name in clear}
        assert ("hunter2" in site.jsonl.read_text()) == ("argv" not in gone)

    def test_at_any_depth_and_of_every_kind(self, site: Any) -> None:
        fields = "labels,exitCode,privileged,externalJobId,targetName,receipt"
        done = site.run(
            "touch",
            "a",
            correlation={"labels": {"password": "hunter2"}},
            export={"artifacts": [{"name": "a", "path": "a"}]},
            variables={"CELLOS_REDACT_EVENT_FIELDS": fields, "CELLOS_EXPORT_DIR": str(site.place / "out")},
        )
        assert done.returncode == 0
        correlation = site.data("lifecycle.v1.started")["correlation"]
        assert (correlation["labels"], correlation["externalJobId"], correlation["platform"]) == ({}, "[redacted]", None)
        assert site.data("command.v1.completed")["exitCode"] == "[redacted]"
        assert site.data("observability.v1.container_security")["privileged"] == "[redacted]"
        assert site.data("export.v2.completed")["receipt"] == {}
        assert "hunter2" not in site.jsonl.read_text()

    def test_in_what_stays_without_a_sink(self, site: Any) -> None:
        del site.variables["CELL_OS_JSONL_EVENTS"]
        done = site.run("true", "hunter2", variables={"CELLOS_REDACT_EVENT_FIELDS": "argv", "RUST_LOG": "info"})
        [evidence] = site.left
        assert f"events are in {evidence}" in done.stderr
        assert b"[redacted]" in evidence.read_bytes()
        assert site.holding("hunter2") == [site.place / "spec.json"]


class TestSignatures:
    @pytest.mark.parametrize("signing", [ED25519, HMAC])
    def test_they_hold_for_what_was_redacted(self, site: Any, signing: dict[str, str]) -> None:
        site.run("true", "hunter2", "é\n", variables=signing | {"CELLOS_REDACT_EVENT_FIELDS": "argv"})
        lines = site.jsonl.read_text().splitlines()
        events = [unwrapped(line) for line in lines]
        assert [event["data"]["argv"] for event in events if "argv" in event["data"]] == [["[redacted]"]]
        assert "hunter2" not in site.jsonl.read_text()
        tampered = json.loads(lines[0])["data"]
        tampered["event"]["data"]["egressRuleCount"] = 7
        with pytest.raises((InvalidSignature, AssertionError)):
            unwrapped(json.dumps({**json.loads(lines[0]), "data": tampered}))

    def test_our_own_reader_agrees(self, site: Any) -> None:
        site.run("true", variables=ED25519)
        keys = site.written("keys.json", {"k1": base64.urlsafe_b64encode(KEY.public_bytes_raw()).decode().rstrip("=")})
        done = site.commands.run("cellos", "events", str(site.jsonl), variables={"CELLOS_EVENT_VERIFY_KEYS_PATH": keys})
        assert done.returncode == 0, done.stdout + done.stderr

    @pytest.mark.parametrize("value", ["", "off", " OFF "])
    def test_they_can_be_off(self, site: Any, value: str) -> None:
        site.run("true", variables=ED25519 | {"CELLOS_EVENT_SIGNING": value})
        assert "signature" not in site.jsonl.read_text()

    @pytest.mark.parametrize(
        ("changed", "text"),
        [
            ({"CELLOS_EVENT_SIGNING": "rsa"}, 'CELLOS_EVENT_SIGNING="rsa": unknown algorithm (expected off|ed25519|hmac)'),
            ({"CELLOS_EVENT_SIGNING_KID": None}, "requires a kid but CELLOS_EVENT_SIGNING_KID is unset"),
            ({"CELLOS_EVENT_SIGNING_KID": " "}, "kid is empty"),
            ({"CELLOS_EVENT_SIGNING_KEY_BASE64": None}, "requires a key but CELLOS_EVENT_SIGNING_KEY_BASE64 is unset"),
            ({"CELLOS_EVENT_SIGNING_KEY_BASE64": "c2VjcmV0!"}, '"<base64 decode failed>": invalid base64url'),
            ({"CELLOS_EVENT_SIGNING_KEY_BASE64": "c2VjcmV0"}, '"<6 bytes>": CELLOS_EVENT_SIGNING=ed25519 requires a 32-byte key, got 6'),
            ({"CELLOS_EVENT_SIGNING_KEY_BASE64": "", "CELLOS_EVENT_SIGNING": "hmac"}, '"<empty>": '),
        ],
    )
    def test_what_is_asked_for_and_cannot_be_done_is_an_error(self, site: Any, changed: dict[str, str | None], text: str) -> None:
        given = {name: value for name, value in (ED25519 | changed).items() if value is not None}
        done = site.run("true", variables=given)
        site.refused(done, "Error: CELLOS_EVENT_SIGNING")
        assert text in done.stderr
        assert "c2VjcmV0" not in done.stderr


class TestDeadLetters:
    @pytest.fixture
    def letters(self, site: Any) -> Path:
        place: Path = site.place / "dlq"
        place.mkdir()
        site.variables["CELLOS_DLQ_DIR"] = str(place)
        return place

    def test_of_a_disk_that_is_full(self, site: Any, letters: Path) -> None:
        """The run succeeds, and each event is a file with the very bytes that the sink did not take."""
        variables = ED25519 | {"CELLOS_REDACT_EVENT_FIELDS": "argv", "CELL_OS_JSONL_EVENTS": "/dev/full"}
        done = site.run("echo", "hunter2", variables=variables)
        assert (done.returncode, done.stdout) == (0, "hunter2\n"), done.stderr
        events = []
        for path in sorted(letters.iterdir()):
            [line] = path.read_bytes().splitlines()
            letter = json.loads(line)
            assert set(letter) == {"error", "event"}
            assert letter["error"] == REFUSED_BY_FULL
            event = unwrapped(line.removeprefix(line[: line.index(b'"event":') + 8]).removesuffix(b"}"))
            assert re.fullmatch(rf"\d{{13}}-{event['id']}\.jsonl", path.name)
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            events.append(event)
        events.sort(key=lambda event: event["data"]["chain"]["seq"])
        assert [event["data"]["chain"]["seq"] for event in events] == list(range(len(events)))
        assert events[-1]["type"] == "dev.cellos.events.cell.lifecycle.v1.destroyed"
        assert site.holding("hunter2") == [site.place / "spec.json"]

    def test_none_where_nothing_went_wrong(self, site: Any, letters: Path) -> None:
        assert site.run("true").returncode == 0
        assert list(letters.iterdir()) == []
        assert site.left == []

    def test_of_a_server_that_is_not_there(self, site: Any, letters: Path) -> None:
        done = site.run("true", variables={"NATS_URL": "nats://user:hunter2@127.0.0.1:1"})
        assert done.returncode == 0
        assert f"{len(site.events)} events were not acknowledged by NATS" in done.stderr
        assert {json.loads(path.read_bytes())["event"]["id"] for path in letters.iterdir()} == {event["id"] for event in site.events}
        assert "hunter2" not in done.stderr
        assert site.holding("hunter2") == site.left == []

    @pytest.mark.parametrize("make", ["missing", "file"])
    def test_a_place_that_is_none_is_told(self, site: Any, make: str) -> None:
        place = site.place / "dlq"
        if make == "file":
            place.touch()
        done = site.run("true", variables={"CELLOS_DLQ_DIR": str(place)})
        assert done.returncode == 0
        assert f'not followed: CELLOS_DLQ_DIR="{place}"' in done.stderr
        del site.variables["CELL_OS_JSONL_EVENTS"]
        site.jsonl.unlink()
        strict = {"CELLOS_DLQ_DIR": str(place), "CELLOS_STRICT_CONFIG": "1", "CELL_OS_USE_NOOP_SINK": ""}
        site.refused(site.run("true", variables=strict), f'CELLOS_DLQ_DIR="{place}"')


class TestNats:
    @pytest.fixture
    def server(self, site: Any) -> Iterator[NatsServer]:
        with NatsServer(str(site.place / "nats")) as started:
            site.variables["NATS_URL"] = started.url
            self.ask(started.url, lambda js: js.add_stream(name="E", subjects=["cellos.>", "ci.>"]))
            yield started

    @staticmethod
    def ask(url: str, action: Any) -> Any:
        async def connected() -> Any:
            connection = await nats.connect(url, allow_reconnect=False)
            try:
                return await action(connection.jetstream())
            finally:
                await connection.close()

        return asyncio.run(connected())

    def messages(self, server: NatsServer) -> list[Any]:
        async def read(js: Any) -> list[Any]:
            count = (await js.stream_info("E")).state.messages
            return [await js.get_msg("E", number) for number in range(1, count + 1)]

        return list(self.ask(server.url, read))

    def test_the_same_bytes_as_everywhere_in_order_and_once(self, site: Any, server: NatsServer) -> None:
        done = site.run("true", variables=ED25519 | {"CELL_OS_REQUIRE_JETSTREAM": "1"})
        assert (done.returncode, site.left) == (0, [])
        found = self.messages(server)
        assert [message.data for message in found] == site.jsonl.read_bytes().splitlines()
        assert [message.headers["Nats-Msg-Id"] for message in found] == [event["id"] for event in site.events]
        assert {message.subject for message in found} == {"cellos.events.v1"}

    @pytest.mark.parametrize(
        ("variables", "tenant", "subject"),
        [
            ({"CELLOS_TENANT_ID": " acme "}, "other", "cellos.events.acme.cell-1.r1"),
            ({"CELLOS_EVENTS_SUBJECT_TEMPLATE": "ci.{tenantId}.{spec_id}.{run_id}"}, "other", "ci.other.cell-1.r1"),
            ({"CELLOS_EVENTS_SUBJECT_TEMPLATE": "ci.{tenantId}", "CELLOS_TENANT_ID": "acme"}, None, "ci._no_tenant_"),
            ({"CELL_OS_EVENTS_SUBJECT": "ci.x"}, None, "ci.x"),
            ({"CELL_OS_EVENTS_SUBJECT": "ci.x", "CELLOS_EVENTS_SUBJECT_TEMPLATE": " "}, None, "ci.x"),
        ],
    )
    def test_the_subject(self, site: Any, server: NatsServer, variables: dict[str, str], tenant: str | None, subject: str) -> None:
        spec = {"correlation": {"tenantId": tenant}} if tenant else {}
        assert site.run("true", **spec, variables={**variables, "CELLOS_RUN_ID": "r1"}).returncode == 0
        assert {message.subject for message in self.messages(server)} == {subject}

    def test_a_server_that_is_required_and_not_there(self, site: Any) -> None:
        """No cell, no waiting, and nothing of the password."""
        variables = {"CELL_OS_REQUIRE_JETSTREAM": "", "NATS_URL": "nats://user:hunter2@127.0.0.1:1"}
        done: subprocess.CompletedProcess[str] = site.run("touch", "ran", variables=variables)
        site.refused(done, "Error: CELL_OS_REQUIRE_JETSTREAM is set but JetStream connect failed (broker nats://127.0.0.1:1): ")
        assert "hunter2" not in done.stderr
        assert not (site.place / "ran").exists()

    def test_the_noop_sink_is_asked_first(self, site: Any) -> None:
        variables = {"CELL_OS_REQUIRE_JETSTREAM": "1", "CELL_OS_USE_NOOP_SINK": "", "NATS_URL": "nats://127.0.0.1:1"}
        assert site.run("true", variables=variables).returncode == 0

    def test_a_certificate_that_cannot_be_read(self, site: Any) -> None:
        variables = {"CELL_OS_REQUIRE_JETSTREAM": "1", "NATS_URL": "tls://127.0.0.1:1", "NATS_CA_FILE": "/nowhere"}
        site.refused(site.run("true", variables=variables), "JetStream connect failed (broker tls://127.0.0.1:1): ")
