"""Where a night's material begins, as a person says it: a date, a time span, a generation or a night."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from memory.errors import ConfigError
from memory.ledger import Ledger
from memory.night_records import Night
from memory.records import now

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86_400, "w": 7 * 86_400}
_EXPECTED = "a date (2026-11-20, 2026-11-20T18:00), a time span (24h, 7d), a generation (gen-3) or a night (night_…)"


def moment(said: str, ledger: Ledger) -> datetime:
    """The moment that `said` means, in UTC; a date without a zone is the machine's own time.

    A generation or night stands for the moment its own material was drawn: what came after it did not learn.
    Raises ConfigError for what cannot be read or lies in the future, NotFoundError for an unknown generation or night.
    """
    if span := re.fullmatch(r"([1-9][0-9]{0,5})([smhdw])", said):
        return now() - timedelta(seconds=int(span[1]) * _UNITS[span[2]])
    if number := re.fullmatch(r"gen-([0-9]{1,9})", said):
        generation = ledger.generation(int(number[1]))
        return _drawn(ledger, ledger.night(generation.night_id)) if generation.night_id else generation.created_at
    if said.startswith("night_"):
        return _drawn(ledger, ledger.night(said))
    try:
        found = datetime.fromisoformat(said).astimezone(now().tzinfo)
    except (ValueError, OverflowError) as exc:
        raise ConfigError(f"since: expected {_EXPECTED}, got {said[:100]!r}") from exc
    if found > now():
        raise ConfigError(f"since: {said} is still to come")
    return found


def _drawn(ledger: Ledger, night: Night) -> datetime:
    drawn = ledger.stage(night.id, "snapshot")
    return drawn.at if drawn else night.created_at
