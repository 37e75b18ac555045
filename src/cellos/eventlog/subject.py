"""The subject that a run's events are published on. Pure.

First that applies: CELLOS_EVENTS_SUBJECT_TEMPLATE with `{spec_id}`, `{run_id}`, `{tenantId}` replaced; CELLOS_TENANT_ID, which makes
`cellos.events.<tenant>.<spec id>.<run id>`; CELL_OS_EVENTS_SUBJECT, in which only `{tenantId}` is replaced; `cellos.events.v1`.

Whatever a document or a caller supplies fills exactly one token: characters that NATS gives a meaning (`.`, `*`, `>`, white space, control
characters) and `%` become `%XX` of their UTF-8 bytes, so different values never make the same token. What an operator wrote is his own
word, and only refused where no message could be published on it, or where a brace is left that is no placeholder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from msgspec import Struct

from cellos.core.documents.identifiers import reserved_in_subjects
from cellos.errors import ConfigError

DEFAULT_SUBJECT = "cellos.events.v1"
NO_TENANT_IN_TEMPLATE = "_no_tenant_"
NO_TENANT = "single"
"""What stands for an absent tenant in CELL_OS_EVENTS_SUBJECT. (Two words for one thing: filters of both kinds exist.)"""
MAX_SUBJECT_BYTES = 1024
"""A server drops a connection whose protocol line, of which the subject is a part, exceeds 4,096 bytes."""

TEMPLATE, TENANT, LITERAL = "CELLOS_EVENTS_SUBJECT_TEMPLATE", "CELLOS_TENANT_ID", "CELL_OS_EVENTS_SUBJECT"
_PLACEHOLDER = re.compile(r"\{(spec_id|run_id|tenantId)\}")
_TENANT_PLACEHOLDER = re.compile(r"\{(tenantId)\}")


class SubjectSettings(Struct, frozen=True, kw_only=True):
    """The three variables, blank ones as None."""

    template: str | None = None
    tenant: str | None = None
    literal: str | None = None


def read_subject_settings(environment: Mapping[str, str]) -> SubjectSettings:
    """The settings, checked as far as that can be done without a run. Raises ConfigError."""
    template, tenant, literal = (environment.get(name, "").strip() or None for name in (TEMPLATE, TENANT, LITERAL))
    bad = reserved_in_subjects(tenant) if tenant is not None else None
    if bad is not None:
        raise ConfigError(
            f"{TENANT} contains NATS-reserved char: {bad!r} (in {_quoted(tenant)}); a tenant is one token of the subject. For more levels, "
            f"set {TEMPLATE}"
        )
    settings = SubjectSettings(template=template, tenant=tenant, literal=literal)
    resolve_subject(settings, spec_id="spec", run_id="run", tenant_id="tenant")
    return settings


def resolve_subject(settings: SubjectSettings, *, spec_id: str, run_id: str, tenant_id: str | None) -> str:
    """The subject of all events of one run. Raises ConfigError, naming the variable that makes it unusable."""
    if settings.template is not None:
        values = {"spec_id": spec_id, "run_id": run_id, "tenantId": tenant_id or NO_TENANT_IN_TEMPLATE}
        return _checked(TEMPLATE, _filled(TEMPLATE, _PLACEHOLDER, settings.template, values))
    if settings.tenant is not None:
        return _checked(TENANT, ".".join(("cellos.events", *(token(part) for part in (settings.tenant, spec_id, run_id)))))
    if settings.literal is not None:
        return _checked(LITERAL, _filled(LITERAL, _TENANT_PLACEHOLDER, settings.literal, {"tenantId": tenant_id or NO_TENANT}))
    return DEFAULT_SUBJECT


def token(value: str) -> str:
    """A value as one token of a subject: unchanged unless it holds a character that has a meaning there."""
    if value and value.isascii() and value.replace("-", "").replace("_", "").isalnum():
        return value
    return "".join(_escaped(character) if _has_meaning(character) else character for character in value) or "%"


def _has_meaning(character: str) -> bool:
    if character == "%" or character < " " or character == "\x7f" or "\ud800" <= character <= "\udfff":
        return True
    return reserved_in_subjects(character) is not None


def _escaped(character: str) -> str:
    return "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))


def _filled(name: str, placeholder: re.Pattern[str], text: str, values: Mapping[str, str]) -> str:
    """In one pass: a value that looks like a placeholder is none. Raises ConfigError for a brace that belongs to no placeholder."""
    rest = placeholder.sub("", text)
    if "{" in rest or "}" in rest:
        known = ", ".join(f"{{{each}}}" for each in values)
        raise ConfigError(f"{name}: {_quoted(text[:200])} has a brace that belongs to no placeholder; known here: {known}")
    return placeholder.sub(lambda match: token(values[match[1]]), text)


def _checked(name: str, subject: str) -> str:
    """Raises ConfigError where no message can be published on `subject`."""
    fault = None
    if any(character.isspace() or character < " " or character == "\x7f" for character in subject):
        fault = "holds white space or a control character"
    elif any(part in {"", "*", ">"} for part in subject.split(".")):
        fault = "has an empty token or a wildcard; events are published on one subject"
    elif len(subject.encode("utf-8", "surrogatepass")) > MAX_SUBJECT_BYTES:
        fault = f"is longer than {MAX_SUBJECT_BYTES} bytes"
    if fault is not None:
        raise ConfigError(f"{name}: the subject {_quoted(subject[:200])} {fault}")
    return subject


def _quoted(text: str | None) -> str:
    return '"' + (text or "").encode("unicode_escape").decode("ascii").replace('"', '\\"') + '"'
