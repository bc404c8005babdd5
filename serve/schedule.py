"""Nights by the clock: at the times of a cron expression a night begins, unless one is running.

Owns nothing durable: the times follow from the settings, the night itself is `serve.night`'s, and whether a time was
kept is in the ledger: a service that comes up within `LATE` of a time at which no night began, begins it. A time that
passed longer ago, while no service ran or the machine slept, is not made up.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from datetime import datetime, timedelta
from typing import Any

from memory.errors import ConflictError, NightschoolError

log = logging.getLogger(__name__)

LATE = timedelta(minutes=5)
"""Later than this, the time was missed."""

LONGEST_NAP_S = 60.0
"""A clock that is set, or a machine that slept, is noticed after so long."""

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
    """The expression itself. ValueError unless it has cron's five fields."""
    from croniter import croniter

    if len(cron.split()) != 5 or not croniter.is_valid(cron):
        raise ValueError(f"{cron!r} is no cron expression of five fields, such as '0 2 * * *'")
    return cron


async def keep(
    cron: str,
    begin: Callable[[], object],
    clock: Callable[[], datetime] = datetime.now,
    sleep: Callable[[float], Awaitable[Any]] = asyncio.sleep,
    last: Callable[[], datetime | None] | None = None,
) -> None:
    """Call `begin`, in a thread, at every time of `cron`; until cancelled. What it refuses is logged.

    `last`: when the newest night began, on the same clock. Without it the times before the start are over.
    """
    # The service may have been killed at the very time, or a moment before it.
    after = clock() - LATE if last is not None else clock()
    newest = await asyncio.to_thread(_told, last) if last is not None else None
    if newest is not None:
        if (missed := last_time(cron, after)) > newest:
            log.warning(MISSED, missed)
        after = max(after, newest)
    while True:
        due = next_time(cron, after)
        while (left := (due - clock()).total_seconds()) > 0:
            await sleep(min(left, LONGEST_NAP_S))
        after = clock()
        if after - due > LATE:
            log.warning(MISSED, due)
            continue
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


def _told(last: Callable[[], datetime | None]) -> datetime | None:
    """When the newest night began; None where the ledger does not say: `begin` refuses what runs."""
    try:
        return last()
    except NightschoolError as exc:
        log.warning("the last night is not known: %s", exc)
        return None


@asynccontextmanager
async def kept(
    cron: str | None, begin: Callable[[], object], last: Callable[[], datetime | None] | None = None
) -> AsyncIterator[None]:
    """`keep`, for as long as the block lasts; nothing without a schedule."""
    if cron is None:
        yield
        return
    keeper = asyncio.create_task(keep(cron, begin, last=last))
    try:
        yield
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
