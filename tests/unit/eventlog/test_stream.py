from __future__ import annotations

from typing import Any

import pytest

from cellos.errors import ConfigError
from cellos.eventlog.stream import VARIABLES, StreamSettings, _covers, differences, read_stream_settings, stream_config

WANTED = stream_config()


def test_settings() -> None:
    assert read_stream_settings({}) == StreamSettings()
    given = {"CELLOS_NATS_STREAM_REPLICAS": "3", "CELLOS_NATS_STREAM_MAX_BYTES": "1048576"}
    assert read_stream_settings(given) == StreamSettings(replicas=3, max_bytes=1 << 20)
    assert given.keys() == {row.name for row in VARIABLES}
    assert {row.default for row in VARIABLES} == {str(StreamSettings().replicas), str(StreamSettings().max_bytes)}


@pytest.mark.parametrize(
    ("name", "value"),
    [("REPLICAS", "2"), ("REPLICAS", "x"), ("MAX_BYTES", "10"), ("MAX_BYTES", "-1"), ("MAX_BYTES", "1e9"), ("MAX_BYTES", "9" * 30)],
)
def test_settings_that_cannot_be(name: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"CELLOS_NATS_STREAM_{name}"):
        read_stream_settings({f"CELLOS_NATS_STREAM_{name}": value})


def test_settings_go_into_the_stream() -> None:
    config = stream_config(replicas=3, max_bytes=5)
    assert (config["num_replicas"], config["max_bytes"], config["discard"]) == (3, 5, "new")


def test_a_stream_like_ours_differs_in_nothing() -> None:
    assert differences(WANTED, WANTED) == ((), ())


@pytest.mark.parametrize(
    ("change", "unusable", "reported"),
    [
        ({"allow_atomic": False}, 1, 0),
        ({"mirror": {"name": "X"}, "subjects": None}, 2, 0),
        ({"subject_transform": {"src": ">", "dest": "x.>"}}, 1, 0),
        ({"sealed": True}, 1, 0),
        ({"num_replicas": 3}, 0, 1),
        ({"max_msgs": 5, "max_msg_size": 100}, 0, 2),
        ({"allow_rollup_hdrs": True}, 0, 1),
        ({"duplicate_window": 1}, 0, 1),
        ({"description": "ours", "metadata": {}}, 0, 0),
    ],
)
def test_differences(change: dict[str, Any], unusable: int, reported: int) -> None:
    found = differences(WANTED | change, WANTED)
    assert (len(found[0]), len(found[1])) == (unusable, reported)


@pytest.mark.parametrize(
    ("subject", "expected"),
    [
        ("cellos.events.>", True),
        ("cellos.>", True),
        (">", True),
        ("cellos.events.*", False),
        ("cellos.events.a.>", False),
        ("cellos.ev.>", False),
        ("*.events.>", False),
        ("cellos.events", False),
    ],
)
def test_which_subjects_cover_all_events(subject: str, expected: bool) -> None:
    assert _covers(subject, "cellos.events.>") is expected
