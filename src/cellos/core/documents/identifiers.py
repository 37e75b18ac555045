"""The identifier classes of documents, each as one pattern that the rules and the JSON Schema share."""

from __future__ import annotations

PORTABLE = r"(?!.*\.\.)[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_ALPHANUMERIC = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789"  # `string` would load `re`
_PORTABLE_CHARACTERS = _ALPHANUMERIC + "._-"
PORTABLE_RULE = "must match [A-Za-z0-9][A-Za-z0-9._-]{0,127} and must not contain '..'"

NAMESPACE = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"
NAMESPACE_RULE = "must match Kubernetes DNS label rules: lowercase alphanumeric plus '-', <=63 chars"

SHA256 = r"sha256:[0-9a-f]{64}"

SEMVER3 = r"(?:0|[1-9][0-9]*)\.(?:0|[1-9][0-9]*)\.(?:0|[1-9][0-9]*)(?:-[A-Za-z0-9.-]+)?"

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?"
# At most 253 characters, not only digits (that would be an address), at least two labels, the first of which may be a wildcard.
FQDN = rf"(?=.{{1,253}}$)(?![0-9.]+$)(?:\*|{_LABEL})(?:\.{_LABEL})+"
FQDN_RULE = "is not a valid FQDN (single leading '*.' wildcard allowed; IPs are rejected)"

# White_Space of Unicode. str.isspace() and str.strip() also take U+001C to U+001F.
WHITE_SPACE = "\t\n\v\f\r \x85\xa0\u1680\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200a\u2028\u2029\u202f\u205f\u3000"
# These divide or match tokens of NATS subjects, which a tenant's name becomes part of.
_RESERVED_IN_SUBJECTS = frozenset(".*>" + WHITE_SPACE)

_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}


def matches(pattern: str, value: str) -> bool:
    """Whether the whole value is of the class."""
    import re  # it costs the start of a run 7 ms; most documents have only portable identifiers

    return re.fullmatch(pattern, value) is not None


def is_portable(value: str) -> bool:
    """Whether the whole value matches PORTABLE."""
    return 0 < len(value) <= 128 and value[0] in _ALPHANUMERIC and not value.strip(_PORTABLE_CHARACTERS) and ".." not in value


def reserved_in_subjects(value: str) -> str | None:
    """The first character that a NATS subject token cannot hold."""
    return next((char for char in value if char in _RESERVED_IN_SUBJECTS), None)


def ascii_lower(value: str) -> str:
    """Lower case of A to Z only: str.lower() would also make a Kelvin sign a k, and two different hosts one."""
    return value.translate(_ASCII_LOWER)
