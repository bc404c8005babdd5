"""Nights by the clock: at the times of a cron expression a night begins, unless one is running.

Owns nothing durable: the times follow from the settings, the night itself is `serve.night`'s. A time that passed
while no service ran, or while the machine slept, is not made up.
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


def next_time(cron: str, after: datetime) -> datetime:
    """The first time of the expression after `after`, on the same (naive, local) clock."""
    from croniter import croniter

    return croniter(cron, after).get_next(datetime)


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
) -> None:
    """Call `begin`, in a thread, at every time of `cron`; until cancelled. What it refuses is logged."""
    while True:
        due = next_time(cron, clock())
        while (left := (due - clock()).total_seconds()) > 0:
            await sleep(min(left, LONGEST_NAP_S))
        if clock() - due > LATE:
            log.warning("the night of %s was missed and is not made up", due)
            continue
        try:
            await asyncio.to_thread(begin)
        except ConflictError as exc:
            log.info("no night at %s: %s", due, exc)
        except NightschoolError as exc:
            log.warning("the night of %s could not begin: %s", due, exc)


@asynccontextmanager
async def kept(cron: str | None, begin: Callable[[], object]) -> AsyncIterator[None]:
    """`keep`, for as long as the block lasts; nothing without a schedule."""
    if cron is None:
        yield
        return
    keeper = asyncio.create_task(keep(cron, begin))
    try:
        yield
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper
