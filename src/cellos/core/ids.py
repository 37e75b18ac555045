"""Identifiers and times as text, from numbers that the caller drew: no clock and no random source in here."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from functools import lru_cache

from cellos.errors import CellosError

UUID_RANDOM_BYTES = 10
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_SECOND = 1_000_000_000
_MAX_UNIX_MS = (1 << 48) - 1
_DAY = 86_400 * _SECOND
_EPOCH_DAY = _EPOCH.toordinal()
# As `rfc3339` writes them. A replay reads a hundred thousand times in a second.
_HOURS = {f"T{hour:02}": hour * 3600 * _SECOND for hour in range(24)}
_MINUTES = {f":{minute:02}": minute * 60 * _SECOND for minute in range(60)}
_SECONDS = {f":{second:02}": second * _SECOND for second in range(60)}
_RFC3339 = r"(\d{4}-\d{2}-\d{2})[Tt ](\d{2}:\d{2}:\d{2})(?:\.(\d+))?([Zz]|[+-]\d{2}:\d{2})"  # compiled where it is first needed


def uuid7(unix_ms: int, random: bytes) -> str:
    """The UUIDv7 (RFC 9562, 5.7) of a time in milliseconds and ten random bytes, of which 74 bits are used.

    Ids of different milliseconds sort by time, as text too.
    """
    if not 0 <= unix_ms <= _MAX_UNIX_MS:
        raise ValueError(f"unix_ms {unix_ms} does not fit in 48 bits")
    if len(random) != UUID_RANDOM_BYTES:
        raise ValueError(f"a UUIDv7 takes {UUID_RANDOM_BYTES} random bytes, got {len(random)}")
    noise = int.from_bytes(random, "big")
    version_and_a = 0x7000 | (noise >> 62) & 0x0FFF
    variant_and_b = 0x8000_0000_0000_0000 | noise & 0x3FFF_FFFF_FFFF_FFFF
    digits = f"{unix_ms:012x}{version_and_a:04x}{variant_and_b:016x}"
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def uuid4(random: bytes) -> str:
    """The UUIDv4 (RFC 9562, 5.4) of 16 random bytes, of which 122 bits are used."""
    digits = random.hex()
    return f"{digits[:8]}-{digits[8:12]}-4{digits[13:16]}-{'89ab'[random[8] >> 4 & 3]}{digits[17:20]}-{digits[20:]}"


def rfc3339(unix_ns: int) -> str:
    """A time in nanoseconds as RFC 3339 in UTC, `+00:00`, always with nine digits of fraction: such texts sort by time."""
    seconds, fraction = divmod(unix_ns, _SECOND)
    days, second = divmod(seconds, 86_400)
    return f"{_day_text(days)}T{second // 3600:02}:{second // 60 % 60:02}:{second % 60:02}.{fraction:09}+00:00"


@lru_cache(maxsize=16)
def _day_text(days: int) -> str:
    return (_EPOCH + timedelta(days=days)).isoformat()[:10]


def unix_ns(text: str) -> int:
    """The nanoseconds of an RFC 3339 time, in any form that events carry (`Z` or an offset, no to nine digits of fraction; more are cut).

    Raises TimeSyntaxError.
    """
    if len(text) == 35 and text[19] == "." and text[29:] == "+00:00":
        fraction = text[20:29]
        if fraction.isdecimal() and fraction.isascii():
            try:
                return _day_ns(text[:10]) + _HOURS[text[10:13]] + _MINUTES[text[13:16]] + _SECONDS[text[16:19]] + int(fraction)
            except (KeyError, ValueError):
                pass  # it may be right in another way
    import re

    match = re.fullmatch(_RFC3339, text, re.ASCII)
    if match is None:
        raise TimeSyntaxError(text)
    day, clock, fraction, zone = match.groups()
    try:
        moment = datetime.fromisoformat(f"{day}T{clock}{'+00:00' if zone in 'Zz' else zone}")
        since = moment - _EPOCH
    except (ValueError, OverflowError) as error:
        raise TimeSyntaxError(text) from error
    return (since.days * 86_400 + since.seconds) * _SECOND + int((fraction or "").ljust(9, "0")[:9])


@lru_cache(maxsize=64)
def _day_ns(text: str) -> int:
    """Raises ValueError for anything but a date with hyphens."""
    if text[4] != "-" or text[7] != "-" or "W" in text:
        raise ValueError(text)
    return (date.fromisoformat(text).toordinal() - _EPOCH_DAY) * _DAY


class TimeSyntaxError(CellosError):
    """Not an RFC 3339 time."""

    code = "time_syntax"

    def __init__(self, text: str) -> None:
        super().__init__(f"not an RFC 3339 time: {text!r}")
