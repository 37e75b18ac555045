"""A formation on its way, in words: what changed since the last look, a row for each member, and how it stands as a whole.

Pure functions. Texts come from documents, cells and nodes, so from anybody: they are shown as `timeline.visible` shows them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from cellos.cli.timeline import visible
from cellos.core.events import NO_EXIT_CODE
from cellos.core.formation.views import AttemptView, FormationView, MemberView
from cellos.core.ids import TimeSyntaxError, unix_ns

PHASES = ("running", "claimed", "dispatched", "backing_off", "ready", "waiting", "failed", "skipped", "succeeded")
"""In the order in which somebody who has room for a few members only wants to see them."""
PHASE_COLOURS = {
    "running": "green",
    "claimed": "green",
    "dispatched": "bright_blue",
    "ready": "bright_blue",
    "backing_off": "yellow",
    "failed": "red",
    "skipped": "yellow",
    "succeeded": "cyan",
}

_NO_CONTROLLER = "no controller runs"


class Change(NamedTuple):
    """What is new: of a member, or of the formation itself (`member` is None). `word` is its phase or status."""

    member: str | None
    word: str
    text: str


def changes(before: FormationView | None, after: FormationView) -> Iterator[Change]:
    """In the order of the document, the formation before, at its end after its members. The first look leaves out who has not begun."""
    is_news = before is None or _standing(before) != _standing(after)
    if is_news and not after.has_ended:
        yield Change(None, after.status, _of_formation(after, first=before is None))
    known = {} if before is None else {member.id: member for member in before.members}
    for member in after.members:
        old = known.get(member.id)
        begun = member.attempt > 0 or member.is_over or _lacks_node(member) is not None
        if member.phase is not None and (begun if old is None else _mark(old) != _mark(member)):
            yield Change(member.id, member.phase, detail(member))
    if is_news and after.has_ended:
        yield Change(None, after.status, _of_formation(after, first=False))


def _standing(view: FormationView) -> tuple[object, ...]:
    return view.status, view.cancelling, _lacks_controller(view)


def _of_formation(view: FormationView, *, first: bool) -> str:
    if view.cancelling is not None:
        return f"is being cancelled: {visible(view.cancelling)}"
    parts = [counted(len(view.members), "member")] if first else []
    parts += [_NO_CONTROLLER] if _lacks_controller(view) else []
    return ", ".join([*parts, *([visible(view.reason)] if view.reason else [])])


def _lacks_controller(view: FormationView) -> bool:
    return any(member.waiting == _NO_CONTROLLER for member in view.members)


def _lacks_node(member: MemberView) -> str | None:
    """Why nothing can come of it as things are. What else it may wait for changes from moment to moment."""
    return member.waiting if member.waiting is not None and member.waiting.startswith("no node") else None


def _mark(member: MemberView) -> tuple[object, ...]:
    """What counts as news."""
    return member.phase, member.attempt, member.node, member.run_id, _lacks_node(member)


def detail(member: MemberView) -> str:
    """Where it runs, how it ended, or what it waits for."""
    parts: list[str] = []
    if member.phase in {"claimed", "running"}:
        parts.append(f"on {visible(member.node or '?')}")
        if member.attempt > 1:
            parts.append(f"attempt {tries(member)}")
    elif member.is_over:
        parts += _result(member)
        took = None if member.last is None else taken(member.last)
        if took is not None:
            parts.append(f"{seconds(took)} on {visible(member.node or '?')}")
        if member.attempt > 1:
            parts.append(f"attempt {tries(member)}")
    elif member.waiting:
        parts.append(visible(member.waiting))
    elif member.phase == "dispatched":
        parts.append(f"asked of the nodes of pool {visible(member.pool)}")
    return ", ".join(parts)


def _result(run: MemberView | AttemptView) -> Iterator[str]:
    """How it ended. A reason holds the exit code, where that is the reason."""
    if run.reason:
        yield visible(run.reason)
    elif run.exit_code is not None and run.exit_code != NO_EXIT_CODE:
        yield f"exit {run.exit_code}"


def tries(member: MemberView) -> str:
    """`2/3`: the second of three; lost nodes may make them more."""
    return f"{member.attempt}/{max(member.attempt, member.retries + 1)}"


def attempt_text(attempt: AttemptView) -> str:
    """How one attempt went."""
    parts = [f"on {visible(attempt.node)}"] if attempt.node else []
    parts += _result(attempt)
    took = taken(attempt)
    if took is not None:
        parts.append(seconds(took))
    return ", ".join(parts)


def summary(view: FormationView, now_ns: int) -> str:
    """One line: `word-count COMPLETED in 3.4 s · 5 members: 4 succeeded, 1 failed · 6 attempts`."""
    start, end = nanoseconds(view.created_at), nanoseconds(view.ended_at)
    if end is None:
        end = now_ns
    parts = [f"{visible(view.label)} {view.status}"]
    if start is not None and end >= start:
        parts[0] += f" {'in' if view.has_ended else 'for'} {seconds(end - start)}"
    parts.append(f"{counted(len(view.members), 'member')}{_by_phase(view.members)}")
    attempts = sum(len(member.attempts) for member in view.members)
    if attempts > len(view.members):
        parts.append(counted(attempts, "attempt"))
    return " · ".join(parts)


def _by_phase(members: Sequence[MemberView]) -> str:
    found = Counter(member.phase for member in members if member.phase is not None)
    order = ("succeeded", "failed", "skipped", "running", "claimed", "dispatched", "backing_off", "ready", "waiting")
    parts = [f"{found[phase]} {phase.replace('_', ' ')}" for phase in order if found[phase]]
    return f": {', '.join(parts)}" if parts else ""


class Row(NamedTuple):
    """A member in a table."""

    member: str
    phase: str
    attempt: str
    node: str
    time: str
    note: str


def row(member: MemberView, now_ns: int) -> Row:
    last = member.last
    start = None if last is None else nanoseconds(last.started_at or last.claimed_at)
    end = None if last is None else nanoseconds(last.ended_at)
    runs = member.phase in {"claimed", "running"}
    time = ""
    if start is not None and (end is not None or runs):
        time = seconds(max(0, (now_ns if end is None else end) - start))
    note = ", ".join(_result(member)) if member.is_over else "" if runs else detail(member)
    return Row(
        visible(member.id),
        (member.phase or "").replace("_", " "),
        tries(member) if member.attempt else "",
        visible(member.node or ""),
        time,
        note,
    )


def shown(members: Sequence[MemberView], room: int) -> tuple[list[MemberView], str]:
    """As many members as there is room for, those that matter most, in the order of the document; and a line about the rest."""
    if len(members) <= room:
        return list(members), ""
    place = {phase: number for number, phase in enumerate(PHASES)}
    order = sorted(range(len(members)), key=lambda index: (place.get(members[index].phase or "", len(place)), index))
    kept = set(order[: max(0, room - 1)])
    rest = [member for index, member in enumerate(members) if index not in kept]
    return [members[index] for index in sorted(kept)], f"… and {len(rest)} more{_by_phase(rest)}"


def tree(members: Sequence[MemberView]) -> Iterator[tuple[str, MemberView]]:
    """Members with what stands before their names in a tree by `authorizedBy`: the coordinator first."""
    below: dict[str | None, list[MemberView]] = {}
    known = {member.id for member in members}
    for member in members:
        parent = member.authorized_by if member.authorized_by in known else None
        below.setdefault(parent, []).append(member)
    waiting = [("", "", member) for member in reversed(below.get(None, []))]
    told: set[str] = set()
    while waiting:
        own, inner, member = waiting.pop()
        if member.id in told:
            continue
        told.add(member.id)
        yield own, member
        children = below.get(member.id, [])
        waiting += [
            (f"{inner}{'└ ' if last else '├ '}", f"{inner}{'  ' if last else '│ '}", child)
            for last, child in reversed([(number == len(children), child) for number, child in enumerate(children, 1)])
        ]


def taken(attempt: AttemptView) -> int | None:
    """Nanoseconds from the claim or start of an attempt to its end."""
    start, end = nanoseconds(attempt.started_at or attempt.claimed_at), nanoseconds(attempt.ended_at)
    return None if start is None or end is None else max(0, end - start)


def nanoseconds(time: str | None) -> int | None:
    try:
        return None if time is None else unix_ns(time)
    except TimeSyntaxError:
        return None


def seconds(nanoseconds: int) -> str:
    """A time for people: `34 ms`, `1.2 s`, `2 min 5 s`, `3 h 2 min`, `2 d 4 h`."""
    milliseconds = nanoseconds // 1_000_000
    if milliseconds < 1_000:
        return f"{milliseconds} ms"
    if milliseconds < 60_000:
        return f"{milliseconds // 100 / 10:.1f} s"
    minutes, rest = divmod(milliseconds // 1_000, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours < 24 else f"{hours // 24} d {hours % 24} h"


def counted(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
