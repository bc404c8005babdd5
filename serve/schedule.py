"""Nights by the clock: at the times of a cron expression a night begins, unless one is running.

A time that passed while no service ran, or while the machine slept, is made up, up to `night.catch_up_s` later; one
night makes up for all that passed. Durable are only the moment since which the expression is in force (a file in the
data folder: a schedule that was just set has missed nothing) and the nights themselves, by which a time that was kept
is known as kept, whatever died since.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from memory.errors import ConflictError, LedgerError, NightschoolError, boundary

log = logging.getLogger(__name__)

LATE = timedelta(minutes=5)
"""A timer, a clock that is set or a restart may be late by so much and still be in time."""

LONGEST_NAP_S = 60.0
"""A clock that is set, or a machine that slept, is noticed after so long."""

AUTUMN = timedelta(hours=1)
"""What lies further ahead of the clock was written by a clock that went wrong, not before the end of summer time."""

FILE = "schedule.json"
"""In the data folder: the expression and since when it has been in force."""

MISSED = "no night began at %s, and it is not made up"


def next_time(cron: str, after: datetime) -> datetime:
    """The first time of the expression after `after`, on the same (naive, local) clock."""
    from croniter import croniter

    return croniter(cron, after).get_next(datetime)


def last_time(cron: str, before: datetime) -> datetime:
    """The last time of the expression before `before`, on the same clock."""
    from croniter import croniter

    return croniter(cron, before).get_prev(datetime)


def check(cron: str) -> str:
    """The expression itself. ValueError unless it has cron's five fields and comes due some day."""
    from croniter import CroniterBadDateError, croniter

    if len(cron.split()) != 5 or not croniter.is_valid(cron):
        raise ValueError(f"{cron!r} is no cron expression of five fields, such as '0 2 * * *'")
    try:
        next_time(cron, datetime.now())
    except CroniterBadDateError as exc:
        raise ValueError(f"{cron!r} never comes due") from exc
    return cron


def in_force_since(folder: Path, cron: str | None, now: datetime) -> datetime:
    """Since when this has been the schedule, on the clock of `now`: from now on, where it was another or none."""
    path = folder / FILE
    with boundary(LedgerError, f"cannot keep {path}"):
        if cron is None:
            path.unlink(missing_ok=True)
            return now
        with suppress(FileNotFoundError, ValueError, KeyError):
            known = json.loads(path.read_text(encoding="utf-8"))
            if known["cron"] == cron:
                return datetime.fromisoformat(known["since"])
        half = path.with_suffix(".half")
        half.write_text(json.dumps({"cron": cron, "since": now.isoformat()}), encoding="utf-8")
        half.replace(path)
    return now


async def keep(
    cron: str,
    begin: Callable[[], object],
    settled: Callable[[], datetime],
    catch_up: timedelta = LATE,
    clock: Callable[[], datetime] = datetime.now,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
) -> None:
    """Call `begin`, in a thread, at every time of `cron`, or up to `catch_up` later; until cancelled. What it refuses
    is logged.

    `settled`: the moment up to which all times are kept or over, on the same (naive, local) clock; asked at the start.
    """
    late = max(LATE, catch_up)
    over = await _told(settled, sleep)
    if over > clock() + AUTUMN:
        over = clock()
    after = max(over, clock() - late)
    if (missed := last_time(cron, after)) > over:
        log.warning(MISSED, missed)
    while True:
        due = next_time(cron, after)
        while (left := (due - clock()).total_seconds()) > 0:
            await sleep(min(left, LONGEST_NAP_S))
        if clock() - due > late:
            log.warning(MISSED, due)
            # Of the times that were slept through, later ones may still be in time.
            after = max(due, clock() - late)
            continue
        after = max(due, clock())
        try:
            await asyncio.to_thread(begin)
            log.info("the night of %s began", due)
        except ConflictError as exc:
            log.info("no night at %s: %s", due, exc)
        except NightschoolError as exc:
            log.warning("the night of %s could not begin: %s", due, exc)
        except Exception:
            # A database out of order tonight must not cost the nights after it.
            log.exception("the night of %s could not begin", due)


async def _told(settled: Callable[[], datetime], sleep: Callable[[float], Awaitable[Any]]) -> datetime:
    """What is settled. A ledger that is away is waited for: without it a night would be begun a second time."""
    while True:
        try:
            return await asyncio.to_thread(settled)
        except NightschoolError as exc:
            log.warning("which nights have been is not known yet: %s", exc)
        await sleep(LONGEST_NAP_S)


@asynccontextmanager
async def kept(
    cron: str | None, begin: Callable[[], object], settled: Callable[[], datetime], catch_up: timedelta = LATE
) -> AsyncIterator[None]:
    """`keep`, for as long as the block lasts; nothing without a schedule."""
    if cron is None:
        yield
        return
    keeper = asyncio.create_task(keep(cron, begin, settled, catch_up))
    try:
        yield
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
