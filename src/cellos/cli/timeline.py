"""Events in words: what happened in a run, one line per event, and the verdict on its chain.

Everything in an event may come from somebody hostile: text is shown with control, formatting and bidirectional characters as escapes, and
no value is expected to have the type that it should have.
"""

from __future__ import annotations

import shlex
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from cellos.core import events, observations
from cellos.core.events import Event
from cellos.core.evidence.verify import Fault, RunReport
from cellos.core.ids import TimeSyntaxError, unix_ns

LONGEST_TEXT = 400
DETAIL_WIDTH = 90
FAULTS_SHOWN = 10
DIGITS_SHOWN = 12
_COMMON = frozenset({"cellId", "specId", "runId", "correlation", "tenantId", "placement", "chain", "schemaVersion"})
_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB")


def visible(text: str) -> str:
    """Text that a terminal shows as it is, cut to a bearable length."""
    if len(text) > LONGEST_TEXT:
        text = f"{text[:LONGEST_TEXT]}… ({len(text)} characters)"
    if text.isprintable():
        return text
    return "".join(character if character.isprintable() else character.encode("unicode_escape").decode() for character in text)


def header(report: RunReport, first: Event, *, keys: bool) -> str:
    """Which run this is. `keys`: there were some to check signatures with."""
    parts = [f"cell {visible(report.cell_id)}", f"run {visible(report.run_id)}"]
    if report.spec_id is not None and report.spec_id != report.cell_id:
        parts.append(f"spec {visible(report.spec_id)}")
    if report.spec_hash is not None:
        parts.append(f"spec sha256 {report.spec_hash[:DIGITS_SHOWN]}…")
    if first.time is not None:
        parts.append(f"from {visible(first.time)}")
    if report.signers:
        parts.append(f"signed by {', '.join(map(visible, report.signers))}, {_SIGNED.get(report.signature, report.signature)}")
    elif keys:
        parts.append("NOT SIGNED")
    return ", ".join(parts)


_SIGNED = {"unchecked": "not checked: no keys given (--keys)", "broken": "but that does not hold"}


def event_lines(event: Event, start_ns: int | None) -> Iterator[str]:
    """One event: a line, and where it says more than fits one, some that are indented below it."""
    label, first, *more = described(event)
    yield f"{_since(event, start_ns):>14}  {label:<13}  {first}".rstrip()
    for line in more:
        for part in textwrap.wrap(line, DETAIL_WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False):
            yield f"{'':14}  {'':13}  {part}"


def described(event: Event) -> list[str]:
    """A label for an event, the most important of it (perhaps nothing), and further lines."""
    label, describe = DESCRIBED.get(event.type, (_generic_label(event.type), _generic))
    return [label, *(list(describe(event.members)) or [""])]


def verdict(report: RunReport) -> str:
    """What the chain says about the run."""
    count = f"{report.events} event{'' if report.events == 1 else 's'}"
    if report.state == "broken":
        what = "signature" if report.fault is not None and report.fault.kind in _SIGNATURE_FAULTS else "chain"
        return f"{what} BROKEN: {visible(str(report.fault))}"
    if report.state == "unchained":
        proven = "only the signature of each could be verified" if report.signature == "verified" else "nothing can be verified"
        return f"no chain: {count} without a link to the one before, so {proven}"
    ends = f"first {str(report.first)[:DIGITS_SHOWN]} last {str(report.last)[:DIGITS_SHOWN]}"
    if report.state == "unfinished":
        return f"chain unfinished: {count} fit, {ends}, but no `destroyed`: it still runs, its supervisor died, or the end was cut off"
    return f"chain verified: {count}, {ends}" + ("" if report.start_checked else "; no spec hash to check the start with")


def fault_lines(faults: Sequence[Fault], where: str) -> Iterator[str]:
    """The faults of lines that belong to no run, of a file or what else `where` is; of many the first ones."""
    if not faults:
        return
    yield f"{visible(where)}: {len(faults)} {'line belongs' if len(faults) == 1 else 'lines belong'} to no run"
    yield from (f"  {visible(str(fault))}" for fault in faults[:FAULTS_SHOWN])
    if len(faults) > FAULTS_SHOWN:
        yield f"  … and {len(faults) - FAULTS_SHOWN} more"


_SIGNATURE_FAULTS = frozenset({"unsigned", "unknown key", "bad signature", "key swap", "algorithm change"})


def start_of(event: Event) -> int | None:
    """The time of an event in nanoseconds, where it has one that can be read."""
    try:
        return None if event.time is None else unix_ns(event.time)
    except TimeSyntaxError:
        return None


def _since(event: Event, start_ns: int | None) -> str:
    now = start_of(event)
    if now is None or start_ns is None:
        return "?"
    milliseconds = (now - start_ns) / 1_000_000
    return f"{milliseconds:+.1f} ms" if abs(milliseconds) < 10_000 else f"{milliseconds / 1000:+.3f} s"


# What each type tells. The functions take `data` and yield lines.

_Describe = Callable[[Mapping[str, Any]], Iterator[str]]


def _started(data: Mapping[str, Any]) -> Iterator[str]:
    enforced, limits, unbounded = data.get("enforced"), data.get("limits"), data.get("unbounded")
    isolated = enforced is None or enforced != []
    yield f"backend {_text(data, 'backend')}, ttl {_text(data, 'ttlSeconds')} s" + ("" if isolated else ", NOTHING IS ENFORCED")
    if isinstance(enforced, list) and enforced:
        yield f"enforced: {', '.join(_enforced(enforced))}"
    if isinstance(limits, dict) and limits:
        yield f"limits: {', '.join(_limit(name, value) for name, value in limits.items())}"
    if isinstance(unbounded, list) and unbounded:
        yield f"not limited: {', '.join(_value(each) for each in unbounded)}"


def _enforced(names: list[object]) -> Iterator[str]:
    """What holds the cell; its namespaces, which are many, as one item."""
    suffix = "-namespace"
    namespaces = [name.removesuffix(suffix) for name in names if isinstance(name, str) and name.endswith(suffix)]
    if namespaces:
        yield f"{len(namespaces)} namespaces ({' '.join(_value(name) for name in namespaces)})"
    yield from (_value(name) for name in names if not (isinstance(name, str) and name.endswith(suffix)))


def _spawned(data: Mapping[str, Any]) -> Iterator[str]:
    argc = data.get("argc")
    rest = f" with {argc - 1} argument{'' if argc == 2 else 's'}" if isinstance(argc, int) and argc > 1 else ""
    yield f"{_text(data, 'program')}{rest}"


def _completed(data: Mapping[str, Any]) -> Iterator[str]:
    spawn_error, signal = data.get("spawnError"), data.get("signal")
    if spawn_error is not None:
        end = _value(spawn_error)
    elif signal is not None:
        end = f"killed by {_signal(signal)}"
    else:
        end = f"exit code {_text(data, 'exitCode')}"
    memory = ", OUT OF MEMORY" if data.get("oomKilled") is True else ""
    lost = ", OUTPUT WAS LOST" if data.get("outputLost") is True else ""
    yield f"{end}, {_text(data, 'durationMs')} ms{memory}{lost}: {_command(data.get('argv'))}"


def _touched(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"{_text(data, 'sourcePath')} for artifact {_text(data, 'artifactName')}"


def _exported(data: Mapping[str, Any]) -> Iterator[str]:
    receipt = data.get("receipt")
    place = receipt if isinstance(receipt, dict) else data  # older events have its members beside the name
    yield f"{_text(data, 'artifactName')} to {_text(place, 'destination')}, {_text(place, 'bytesWritten')} bytes"


def _export_failed(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"{_text(data, 'artifactName')}: {_text(data, 'reason')}"


def _destroyed(data: Mapping[str, Any]) -> Iterator[str]:
    reason = f": {_text(data, 'reason')}" if "reason" in data else ""
    residue = {"none": "; nothing left behind", "documented_exception": "; SOMETHING WAS LEFT BEHIND"}.get(
        str(data.get("residueClass")), ""
    )
    yield f"{_text(data, 'outcome')}{reason}{residue}"
    left = data.get("residueException")
    for each in left if isinstance(left, list) else []:
        yield f"left behind: {_text(each, 'kind')} {_text(each, 'detail')}" if isinstance(each, dict) else f"left behind: {_value(each)}"


def _scope(data: Mapping[str, Any]) -> Iterator[str]:
    opaque = ", AND WHAT NOBODY CAN READ" if data.get("hasOpaqueNetworkAuthority") is True else ""
    yield f"{_count(data.get('egressRuleCount'), 'destination')} declared{opaque}"


def _target_set(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"declared destinations are those of {_digest(data.get('currentDigest'))}"


def _decision(data: Mapping[str, Any]) -> Iterator[str]:
    rule = f" by {_text(data, 'ruleRef')}" if "ruleRef" in data else ""
    yield f"{_text(data, 'action')} {_text(data, 'sniHost')}: {_text(data, 'reasonCode')}{rule}"


def _security(data: Mapping[str, Any]) -> Iterator[str]:
    if data.get("privileged") is True:
        power = "ALL CAPABILITIES"
    else:
        power = "no capability" if data.get("capEff") == _NO_CAPABILITIES else f"capabilities {_text(data, 'capEff')}"
        power += "" if data.get("capBnd") == _NO_CAPABILITIES else f", can gain {_text(data, 'capBnd')}"
    gain = ", no new privileges" if data.get("noNewPrivs") is True else ", CAN GAIN PRIVILEGES"
    filtered = ", system calls filtered" if data.get("seccompMode") == _FILTERED else ", NO SYSTEM CALL FILTER"
    yield f"{power}{gain}{filtered}"


def _network(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"a network of its own, {_count(data.get('declaredEgressCount'), 'destination')} declared"


def _enforcement(data: Mapping[str, Any]) -> Iterator[str]:
    rules = "a packet filter" if data.get("nftRulesApplied") is True else "no way out, so no packet filter"
    yield f"a network of its own, {rules}"


def _output(data: Mapping[str, Any]) -> Iterator[str]:
    what = f"{len(str(data.get('base64')))} digits of base64" if "base64" in data else _value(data.get("text"))
    more = " … more was written and is not kept" if data.get("truncated") is True else ""
    yield f"{_text(data, 'stream')} at {_text(data, 'offset')}: {what}{more}"


def _identity(data: Mapping[str, Any]) -> Iterator[str]:
    identity = data.get("identity")
    who = identity if isinstance(identity, dict) else {}
    reason = f": {_text(data, 'operation')}: {_text(data, 'reason')}" if "operation" in data else ""
    yield f"{_text(who, 'provider')} for {_text(who, 'audience')}, as {_text(who, 'secretRef')}{reason}"


def _summary(data: Mapping[str, Any]) -> Iterator[str]:
    limits = "limits declared" if data.get("resourceLimitsPresent") is True else "no limits declared"
    pack = f", policy pack {_text(data, 'policyPackId')}" if "policyPackId" in data else ""
    yield f"secrets by {_text(data, 'secretDeliveryMode')}, {limits}, {_count(data.get('egressRuleCount'), 'destination')}{pack}"


def _homeostasis(data: Mapping[str, Any]) -> Iterator[str]:
    used = data.get("exercisedEgressConnections")
    connections = "connections not counted" if used is None else _count(used, "connection")
    fetched = f", {_value(data['exercisedSecretCount'])} asked for" if "exercisedSecretCount" in data else ""
    secrets = f"{_count(data.get('declaredSecretCount'), 'secret')} declared{fetched}"
    yield f"{connections} to {_count(data.get('declaredEgressRules'), 'destination')}; {secrets}"
    removals = data.get("recommendedRemovals")
    for each in removals if isinstance(removals, list) else []:
        yield f"not used, could go: {_value(each.get('name') if isinstance(each, dict) else each)}"


def _rejected(data: Mapping[str, Any]) -> Iterator[str]:
    if "message" in data:
        yield _text(data, "message")
    violations = data.get("violations")
    for each in violations if isinstance(violations, list) else []:
        yield f"{_text(each, 'rule')}: {_text(each, 'message')}" if isinstance(each, dict) else _value(each)


def _claimed(data: Mapping[str, Any]) -> Iterator[str]:
    yield f"by {_text(data, 'node')}, attempt {_text(data, 'attempt')} of {_text(data, 'memberId')}"


def _attempt(data: Mapping[str, Any]) -> Iterator[str]:
    reason = f": {_text(data, 'reason')}" if "reason" in data else f" asked of pool {_text(data, 'pool')}"
    yield f"attempt {_text(data, 'attempt')} of {_text(data, 'memberId')}{reason}"


def _count(number: object, what: str) -> str:
    if number == 0:
        return f"no {what}"
    return f"{_value(number)} {what}{'' if number == 1 else 's'}"


def _digest(digest: object) -> str:
    name, _, digits = str(digest).partition(":")
    return visible(f"{name} {digits[:DIGITS_SHOWN]}…" if digits else name)


_NO_CAPABILITIES = "0" * 16
_FILTERED = 2  # proc_pid_status(5), Seccomp


def _generic(data: Mapping[str, Any]) -> Iterator[str]:
    yield visible(", ".join(f"{name} {_value(value)}" for name, value in data.items() if name not in _COMMON))


DESCRIBED: dict[str, tuple[str, _Describe]] = {
    events.STARTED: ("started", _started),
    events.PROCESS_SPAWNED: ("spawned", _spawned),
    events.COMMAND_COMPLETED: ("completed", _completed),
    events.FS_TOUCH: ("reading", _touched),
    events.EXPORT_COMPLETED: ("exported", _exported),
    events.EXPORT_FAILED: ("export failed", _export_failed),
    events.DESTROYED: ("destroyed", _destroyed),
    # cellos.core.formation.runs has these three, and loads what reads documents.
    events.PREFIX + "run.v1.dispatched": ("dispatched", _attempt),
    events.PREFIX + "run.v1.claimed": ("claimed", _claimed),
    events.PREFIX + "run.v1.void": ("void", _attempt),
    observations.NETWORK_SCOPE: ("asks for", _scope),
    observations.DNS_TARGET_SET: ("names", _target_set),
    observations.L7_EGRESS_DECISION: ("names", _decision),
    observations.CONTAINER_SECURITY: ("powers", _security),
    observations.NETWORK_POLICY: ("network", _network),
    observations.NETWORK_ENFORCEMENT: ("network", _enforcement),
    observations.COMMAND_OUTPUT: ("output", _output),
    observations.IDENTITY_MATERIALIZED: ("identity", _identity),
    observations.IDENTITY_FAILED: ("NO identity", _identity),
    observations.IDENTITY_REVOKED: ("identity gone", _identity),
    observations.COMPLIANCE_SUMMARY: ("summary", _summary),
    observations.HOMEOSTASIS: ("used", _homeostasis),
    observations.POLICY_REJECTED: ("REFUSED", _rejected),
    observations.AUTHZ_REJECTED: ("REFUSED", _rejected),
}


def _generic_label(event_type: str) -> str:
    """`dev.cellos.events.cell.observability.v1.network_scope` is "network scope"."""
    return visible(event_type.removeprefix(events.PREFIX).rpartition(".")[2].replace("_", " "))


def _text(data: Mapping[str, Any], name: str) -> str:
    value = data.get(name)
    return "?" if value is None else _value(value)


def _value(value: object) -> str:
    if isinstance(value, str):
        return visible(value)
    from json import dumps  # as it stands in the event

    return visible(dumps(value, ensure_ascii=False))


def _command(argv: object) -> str:
    """A command line that a shell would take apart in the same way."""
    if not isinstance(argv, list):
        return _value(argv)
    return visible(" ".join(shlex.quote(each) if isinstance(each, str) else _value(each) for each in argv))


def _signal(number: object) -> str:
    import signal

    try:
        return signal.Signals(number).name if isinstance(number, int) else f"signal {_value(number)}"
    except ValueError:
        return f"signal {number}"


def _limit(name: str, value: object) -> str:
    """`memoryBytes: 536870912` is "memory 512 MiB", `cpuMicrosPerSecond: 500000` is "cpu 0.5"; other names stay as they are."""
    if name == "cpuMicrosPerSecond" and isinstance(value, int):
        return f"cpu {value / 1_000_000:g}"
    if not name.endswith("Bytes") or not isinstance(value, int):
        return f"{visible(name)} {_value(value)}"
    unit = 0
    while value and value % 1024 == 0 and unit < len(_UNITS) - 1:
        value, unit = value // 1024, unit + 1
    return f"{visible(name.removesuffix('Bytes'))} {value} {_UNITS[unit]}"
