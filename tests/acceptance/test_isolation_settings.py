"""Variables of isolation, as an operator sets them: in effect in the cell, or an error that names them before anything runs."""

from __future__ import annotations

import errno
import json
import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellos.sandbox.seccomp import denying

pytestmark = pytest.mark.linux_backend

UNAME = 63
Supervise = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    return tmp_path / "events.jsonl"


@pytest.fixture
def supervise(commands: Any, tmp_path: Path, jsonl: Path) -> Supervise:
    """`cellos-supervisor` of a document with this command, in an environment with these variables."""

    def run(*argv: str, run: dict[str, Any] | None = None, **variables: str) -> subprocess.CompletedProcess[str]:
        body = {"id": "x", "authority": {}, "lifetime": {"ttlSeconds": 60}, "run": {"argv": argv, "secretDelivery": "env", **(run or {})}}
        path = tmp_path / "spec.json"
        path.write_text(json.dumps({"apiVersion": "cellos.io/v1", "kind": "ExecutionCell", "spec": body}))
        done: subprocess.CompletedProcess[str] = commands.run(
            "cellos-supervisor", str(path), variables={"CELL_OS_JSONL_EVENTS": str(jsonl), **variables}
        )
        return done

    return run


def data_of(jsonl: Path, kind: str) -> dict[str, Any]:
    events = [json.loads(line) for line in jsonl.read_text().splitlines()]
    (found,) = [event["data"] for event in events if event["type"].endswith(kind)]
    return dict(found)


# -- filters


@pytest.mark.parametrize("variables", [{}, {"CELLOS_SUBPROCESS_SECCOMP": "bpf"}], ids=["alone", "by word"])
def test_a_filter_of_ones_own(supervise: Supervise, jsonl: Path, tmp_path: Path, variables: dict[str, str]) -> None:
    path = tmp_path / "no-uname.bpf"
    path.write_bytes(denying({UNAME: errno.EPERM}))
    done = supervise("uname", CELLOS_SECCOMP_BPF_PATH=str(path), **variables)
    assert done.returncode == 1
    assert "uname: cannot get system name: Operation not permitted" in done.stderr
    assert supervise("true", CELLOS_SECCOMP_BPF_PATH=str(path), **variables).returncode == 0


@pytest.mark.parametrize("word", ["off", "0", "none", "baseline", "1", ""])
def test_no_word_turns_ours_off(supervise: Supervise, jsonl: Path, word: str) -> None:
    done = supervise("unshare", "--uts", "true", CELLOS_SUBPROCESS_SECCOMP=word)
    assert (
        done.stdout + done.stderr.replace("Error: command exited with status 1\n", "")
        == "unshare: unshare failed: Operation not permitted\n"
    )
    assert data_of(jsonl, "container_security")["capEff"] == "0" * 16


@pytest.mark.parametrize(
    ("variables", "text"),
    [
        (
            {"CELLOS_SUBPROCESS_SECCOMP": "on"},
            'seccomp: CELLOS_SUBPROCESS_SECCOMP must be one of: 1, default, baseline, bpf, 0, off, none (got "on")',
        ),
        ({"CELLOS_SUBPROCESS_SECCOMP": "bpf"}, "seccomp: CELLOS_SUBPROCESS_SECCOMP=bpf requires CELLOS_SECCOMP_BPF_PATH"),
        (
            {"CELLOS_SUBPROCESS_SECCOMP": "baseline", "CELLOS_SECCOMP_BPF_PATH": "/f"},
            "seccomp: CELLOS_SUBPROCESS_SECCOMP=baseline cannot be combined with CELLOS_SECCOMP_BPF_PATH (/f)",
        ),
        ({"CELLOS_SECCOMP_BPF_PATH": "/no/such"}, "seccomp: CELLOS_SECCOMP_BPF_PATH /no/such: No such file or directory (os error 2)"),
        ({"CELLOS_SECCOMP_BPF_PATH": "/dev/null"}, "seccomp: CELLOS_SECCOMP_BPF_PATH /dev/null: seccomp BPF program is empty"),
        ({"CELLOS_CGROUP_MEMORY_MAX": "lots"}, "CELLOS_CGROUP_MEMORY_MAX: expected `max`, `<bytes>`, "),
        ({"CELLOS_CGROUP_CPU_MAX": "half"}, "CELLOS_CGROUP_CPU_MAX: expected `max`, `<quota_micros>`, "),
        ({"CELLOS_CGROUP_PARENT": "/no/such"}, "CELLOS_CGROUP_PARENT: create cgroup dir /no/such: No such file or directory (os error 2)"),
        ({"CELLOS_CGROUP_PARENT": "no/such"}, "CELLOS_CGROUP_PARENT: create cgroup dir no/such: not an absolute path (os error 22)"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_cannot_be_meant_is_refused_before_anything_runs(
    supervise: Supervise, jsonl: Path, variables: dict[str, str], text: str
) -> None:
    done = supervise("sh", "-c", "echo ran", **variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Error: {text}" in done.stderr
    assert not jsonl.exists() or jsonl.read_text() == ""


# -- namespaces


def test_namespaces_are_there_whatever_is_asked_for(supervise: Supervise, jsonl: Path) -> None:
    done = supervise("readlink", "/proc/self/ns/net", "/proc/self/ns/uts", CELLOS_SUBPROCESS_UNSHARE="pid,cgroups")
    ours = [os.readlink(f"/proc/self/ns/{name}") for name in ("net", "uts")]
    assert done.returncode == 0
    assert not set(done.stdout.split()) & set(ours)
    assert 'CELLOS_SUBPROCESS_UNSHARE: "cgroups" is no namespace and is ignored; known: pid, ipc, net, uts, mnt' in done.stderr
    assert {"network-namespace", "uts-namespace"} <= set(data_of(jsonl, "lifecycle.v1.started")["enforced"])


@pytest.mark.parametrize(
    "variables",
    [
        {"CELLOS_SUBPROCESS_UNSHARE": "1"},
        {"CELLOS_SUBPROCESS_SECCOMP": "baseline"},
        {"CELLOS_SECCOMP_BPF_PATH": "/f"},
        {"CELLOS_CGROUP_PARENT": "/sys/fs/cgroup"},
        {"CELLOS_CGROUP_MEMORY_MAX": "64M"},
        {"CELLOS_CGROUP_CPU_MAX": "max"},
    ],
    ids=str,
)
def test_the_stub_refuses_by_name_what_it_cannot_do(supervise: Supervise, jsonl: Path, variables: dict[str, str]) -> None:
    done = supervise("sh", "-c", "echo ran", CELLOS_CELL_BACKEND="stub", **variables)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"{next(iter(variables))} asks for isolation, and the stub backend isolates nothing" in done.stderr


# -- limits


@pytest.mark.needs("limit memory", "limit processor time")
def test_defaults_of_the_host(supervise: Supervise, jsonl: Path) -> None:
    done = supervise("true", CELLOS_CGROUP_MEMORY_MAX="64M", CELLOS_CGROUP_CPU_MAX="20000 40000")
    assert done.returncode == 0, done.stderr
    limits = data_of(jsonl, "lifecycle.v1.started")["limits"]
    assert (limits["memoryBytes"], limits["cpuMicrosPerSecond"]) == (64 << 20, 500_000)


@pytest.mark.needs("limit memory", "limit processor time")
def test_a_document_that_declares_wins(supervise: Supervise, jsonl: Path) -> None:
    declared = {"limits": {"memoryMaxBytes": 32 << 20, "cpuMax": {"quotaMicros": 10_000}}}
    done = supervise("true", run=declared, CELLOS_CGROUP_MEMORY_MAX="64M", CELLOS_CGROUP_CPU_MAX="max")
    assert done.returncode == 0, done.stderr
    limits = data_of(jsonl, "lifecycle.v1.started")["limits"]
    assert (limits["memoryBytes"], limits["cpuMicrosPerSecond"]) == (32 << 20, 100_000)


@pytest.mark.needs("limit memory", "limit processor time")
def test_no_limit_shows_in_the_record(supervise: Supervise, jsonl: Path) -> None:
    assert supervise("true", CELLOS_CGROUP_MEMORY_MAX="max", CELLOS_CGROUP_CPU_MAX="max 50000").returncode == 0
    isolation = data_of(jsonl, "lifecycle.v1.started")
    assert {"memory", "cpu"} <= set(isolation["unbounded"])
    assert not {"memoryBytes", "cpuMicrosPerSecond"} & set(isolation["limits"])


# -- backends of which only the settings are known


@pytest.mark.parametrize(
    ("backend", "text"),
    [
        ("firecracker", "firecracker backend init: CELLOS_FIRECRACKER_BINARY must be set to an absolute path to the "),
        ("gvisor", "CELLOS_CELL_BACKEND=gvisor: "),
    ],
)
def test_other_backends_run_nothing(supervise: Supervise, jsonl: Path, backend: str, text: str) -> None:
    done = supervise("sh", "-c", "echo ran", CELLOS_CELL_BACKEND=backend)
    assert (done.returncode, done.stdout) == (1, "")
    assert f"Error: {text}" in done.stderr
    assert not jsonl.exists() or jsonl.read_text() == ""
