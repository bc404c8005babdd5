"""Nights by a clock that the test winds."""

from __future__ import annotations

import asyncio
from datetime import datetime, timedelta

import pytest

from memory.errors import ConfigError, ConflictError, LedgerError
from serve import schedule
from serve.settings import load_settings

MIDNIGHT = datetime(2026, 11, 23)


class WoundUpError(Exception):
    """The end of a test's time."""


class Clock:
    """Time passes by sleeping alone, and jumps where the test says so."""

    def __init__(self, until: datetime, jumps: dict[datetime, timedelta] | None = None) -> None:
        self.now = MIDNIGHT
        self.until = until
        self.jumps = jumps or {}

    async def sleep(self, seconds: float) -> None:
        self.now += timedelta(seconds=seconds)
        for moment in [m for m in self.jumps if m <= self.now]:
            self.now += self.jumps.pop(moment)
        if self.now > self.until:
            raise WoundUpError


def begun(
    cron: str, clock: Clock, refusals: list[Exception] | None = None, last: datetime | None = None
) -> list[datetime]:
    """When nights were begun until the clock stopped; the first ones are refused as said."""
    times: list[datetime] = []
    refused = list(refusals or [])

    def begin() -> None:
        times.append(clock.now)
        if refused:
            raise refused.pop(0)

    with pytest.raises(WoundUpError):
        asyncio.run(schedule.keep(cron, begin, lambda: clock.now, clock.sleep, lambda: last))
    return times


def test_a_night_begins_at_each_time_and_once() -> None:
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=3)))
    assert times == [MIDNIGHT + timedelta(days=day, hours=2) for day in range(3)]


def test_a_night_that_cannot_begin_does_not_end_the_schedule() -> None:
    refusals = [ConflictError("a night is running"), LedgerError("the disk is full"), RuntimeError("DBOS is away")]
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=4)), refusals)
    assert len(times) == 4


def test_a_ledger_that_is_away_at_the_start_does_not_end_the_schedule() -> None:
    clock, times = Clock(MIDNIGHT + timedelta(days=1)), list[datetime]()

    def last() -> datetime:
        raise LedgerError("the database is starting")

    with pytest.raises(WoundUpError):
        asyncio.run(schedule.keep("0 2 * * *", lambda: times.append(clock.now), lambda: clock.now, clock.sleep, last))
    assert times == [MIDNIGHT + timedelta(hours=2)]


def test_a_time_that_was_slept_through_is_told_and_not_made_up(caplog: pytest.LogCaptureFixture) -> None:
    asleep = {MIDNIGHT + timedelta(hours=1): timedelta(hours=4)}
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=2), asleep))
    assert times == [MIDNIGHT + timedelta(days=1, hours=2)]
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        "no night began at 2026-11-23 02:00:00, and it is not made up"
    ]


def test_a_time_that_was_missed_by_a_minute_is_kept() -> None:
    asleep = {MIDNIGHT + timedelta(hours=1, minutes=59): timedelta(minutes=2)}
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=1), asleep))
    assert times == [MIDNIGHT + timedelta(hours=2, minutes=1)]


@pytest.mark.parametrize(
    ("began_before", "kept"),
    [(None, True), (timedelta(days=1), True), (timedelta(minutes=2), False), (timedelta(minutes=1), False)],
)
def test_a_service_that_was_killed_at_the_time_begins_the_night_once_it_is_back(
    began_before: timedelta | None, kept: bool
) -> None:
    clock = Clock(MIDNIGHT + timedelta(hours=3))
    clock.now = MIDNIGHT + timedelta(hours=2, minutes=2)
    times = begun("0 2 * * *", clock, last=clock.now - began_before if began_before else None)
    assert times == ([MIDNIGHT + timedelta(hours=2, minutes=2)] if kept else [])


def test_a_service_that_comes_up_long_after_the_time_waits_for_the_next() -> None:
    clock = Clock(MIDNIGHT + timedelta(days=1, hours=3))
    clock.now = MIDNIGHT + timedelta(hours=2, minutes=9)
    assert begun("0 2 * * *", clock) == [MIDNIGHT + timedelta(days=1, hours=2)]


@pytest.mark.parametrize(
    ("newest", "missed"),
    [(None, False), (MIDNIGHT - timedelta(hours=22), True), (MIDNIGHT + timedelta(hours=2, seconds=1), False)],
)
def test_a_time_at_which_no_service_ran_is_told(
    newest: datetime | None, missed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(MIDNIGHT + timedelta(hours=20))
    clock.now = MIDNIGHT + timedelta(hours=9)
    assert begun("0 2 * * *", clock, last=newest) == []
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == ["no night began at 2026-11-23 02:00:00, and it is not made up"] * missed


def test_the_schedule_ends_with_the_service() -> None:
    async def live() -> int:
        async with schedule.kept("* * * * *", lambda: None):
            during = len(asyncio.all_tasks())
        return during - len(asyncio.all_tasks())

    assert asyncio.run(live()) == 1


@pytest.mark.parametrize("cron", ["at two", "0 2 * *", "0 2 * * * *", "61 2 * * *", "0 25 * * *"])
def test_what_is_no_cron_expression_is_refused_at_the_start(cron: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_NIGHT__SCHEDULE", cron)
    with pytest.raises(ConfigError, match=r"night\.schedule"):
        load_settings()


def test_there_is_no_schedule_until_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().night.schedule is None
    monkeypatch.setenv("NIGHTSCHOOL_NIGHT__SCHEDULE", "0 2 * * *")
    assert load_settings().night.schedule == "0 2 * * *"
