"""Nights by a clock that the test winds."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from datetime import datetime, timedelta
from pathlib import Path

import pytest

from memory.errors import ConfigError, ConflictError, LedgerError
from serve import schedule
from serve.settings import load_settings
from serve.wiring import open_ledger
from tests.serve.fake_engine import ROOT
from tests.serve.fakes import settings_in

MIDNIGHT = datetime(2026, 11, 23)
HOURS = timedelta(hours=3)


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
    cron: str,
    clock: Clock,
    refusals: list[Exception] | None = None,
    settled: datetime = MIDNIGHT,
    catch_up: timedelta = HOURS,
) -> list[datetime]:
    """When nights were begun until the clock stopped; the first ones are refused as said. All times up to `settled`
    are over."""
    times: list[datetime] = []
    refused = list(refusals or [])

    def begin() -> None:
        times.append(clock.now)
        if refused:
            raise refused.pop(0)

    with pytest.raises(WoundUpError):
        asyncio.run(schedule.keep(cron, begin, lambda: settled, catch_up, lambda: clock.now, clock.sleep))
    return times


def test_a_night_begins_at_each_time_and_once() -> None:
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=3)))
    assert times == [MIDNIGHT + timedelta(days=day, hours=2) for day in range(3)]


def test_a_night_that_cannot_begin_does_not_end_the_schedule() -> None:
    refusals = [ConflictError("a night is running"), LedgerError("the disk is full"), RuntimeError("DBOS is away")]
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=4)), refusals)
    assert len(times) == 4


def test_a_ledger_that_is_away_at_the_start_is_waited_for() -> None:
    clock, times, answers = Clock(MIDNIGHT + timedelta(days=1)), list[datetime](), iter([False] * 3 + [True])
    clock.now = MIDNIGHT + timedelta(hours=2)

    def settled() -> datetime:
        if not next(answers):
            raise LedgerError("the database is starting")
        return MIDNIGHT

    keep = schedule.keep("0 2 * * *", lambda: times.append(clock.now), settled, HOURS, lambda: clock.now, clock.sleep)
    with pytest.raises(WoundUpError):
        asyncio.run(keep)
    assert times == [MIDNIGHT + timedelta(hours=2, minutes=3)]


def warned(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]


def test_a_time_that_was_slept_through_is_made_up_while_it_is_night(caplog: pytest.LogCaptureFixture) -> None:
    asleep = {MIDNIGHT + timedelta(hours=1): timedelta(hours=3)}
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=2), asleep))
    assert times == [MIDNIGHT + timedelta(hours=4, minutes=0), MIDNIGHT + timedelta(days=1, hours=2)]
    assert warned(caplog) == []


@pytest.mark.parametrize("catch_up", [HOURS, timedelta(0)])
def test_a_time_that_was_slept_through_for_longer_is_told_and_not_made_up(
    catch_up: timedelta, caplog: pytest.LogCaptureFixture
) -> None:
    asleep = {MIDNIGHT + timedelta(hours=1): timedelta(hours=4) if catch_up else timedelta(hours=1, minutes=6)}
    asleep = {moment: jump + timedelta(minutes=1) for moment, jump in asleep.items()}
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=2), asleep), catch_up=catch_up)
    assert times == [MIDNIGHT + timedelta(days=1, hours=2)]
    assert warned(caplog) == ["no night began at 2026-11-23 02:00:00, and it is not made up"]


def test_of_many_times_that_were_slept_through_one_is_made_up() -> None:
    asleep = {MIDNIGHT + timedelta(minutes=30): timedelta(hours=9)}
    times = begun("0 * * * *", Clock(MIDNIGHT + timedelta(hours=11, minutes=30), asleep))
    assert times == [MIDNIGHT + timedelta(hours=hour, minutes=minute) for hour, minute in ((9, 30), (10, 0), (11, 0))]


@pytest.mark.parametrize(
    ("late", "settled", "kept"),
    [
        (timedelta(minutes=2), -timedelta(days=1), True),
        (timedelta(hours=1), -timedelta(days=1), True),
        # A night began or ended behind the time, or the schedule was set behind it.
        (timedelta(minutes=2), timedelta(seconds=1), False),
        (timedelta(hours=1), timedelta(minutes=59), False),
        (timedelta(hours=1), timedelta(0), False),
        (timedelta(hours=10), -timedelta(days=1), False),
    ],
)
def test_a_service_that_was_down_at_the_time_begins_the_night_once_it_is_back(
    late: timedelta, settled: timedelta, kept: bool
) -> None:
    due = MIDNIGHT + timedelta(hours=2)
    clock = Clock(MIDNIGHT + timedelta(days=1))
    clock.now = due + late
    assert begun("0 2 * * *", clock, settled=due + settled) == ([due + late] if kept else [])


@pytest.mark.parametrize(
    ("settled", "missed"), [(MIDNIGHT - timedelta(hours=22), True), (MIDNIGHT + timedelta(hours=2, seconds=1), False)]
)
def test_a_time_at_which_no_service_ran_is_told(
    settled: datetime, missed: bool, caplog: pytest.LogCaptureFixture
) -> None:
    clock = Clock(MIDNIGHT + timedelta(hours=20))
    clock.now = MIDNIGHT + timedelta(hours=9)
    assert begun("0 2 * * *", clock, settled=settled) == []
    assert warned(caplog) == ["no night began at 2026-11-23 02:00:00, and it is not made up"] * missed


def test_a_time_that_summer_time_leaps_over_is_kept_behind_the_leap() -> None:
    spring = {MIDNIGHT + timedelta(hours=2): timedelta(hours=1)}
    times = begun("30 2 * * *", Clock(MIDNIGHT + timedelta(days=2), spring))
    assert times == [MIDNIGHT + timedelta(hours=3), MIDNIGHT + timedelta(days=1, hours=2, minutes=30)]


@pytest.mark.parametrize("cron", ["30 2 * * *", "59 2 * * *", "0 2 * * *"])
def test_a_time_that_comes_twice_as_summer_time_ends_is_kept_once(cron: str) -> None:
    autumn = {MIDNIGHT + timedelta(hours=3): -timedelta(hours=1)}
    times = begun(cron, Clock(MIDNIGHT + timedelta(hours=23), autumn))
    assert len(times) == 1


@pytest.mark.parametrize(("hour", "minute"), [(2, 10), (2, 30), (2, 40)])
def test_a_service_that_is_back_in_the_hour_that_comes_twice_begins_no_second_night(hour: int, minute: int) -> None:
    clock = Clock(MIDNIGHT + timedelta(hours=23))
    # It was 2:30 of summer time when the night began.
    clock.now = MIDNIGHT + timedelta(hours=hour, minutes=minute)
    assert begun("30 2 * * *", clock, settled=MIDNIGHT + timedelta(hours=2, minutes=30, seconds=1)) == []


def test_a_night_from_a_clock_that_ran_years_ahead_does_not_end_the_schedule() -> None:
    times = begun("0 2 * * *", Clock(MIDNIGHT + timedelta(days=1)), settled=MIDNIGHT + timedelta(days=999))
    assert times == [MIDNIGHT + timedelta(hours=2)]


def test_a_schedule_that_was_just_set_has_missed_nothing(tmp_path: Path) -> None:
    noon = MIDNIGHT + timedelta(hours=12)
    assert schedule.in_force_since(tmp_path, "0 2 * * *", MIDNIGHT) == MIDNIGHT
    assert schedule.in_force_since(tmp_path, "0 2 * * *", noon) == MIDNIGHT
    assert schedule.in_force_since(tmp_path, "0 11 * * *", noon) == noon
    schedule.in_force_since(tmp_path, None, noon)
    assert schedule.in_force_since(tmp_path, "0 11 * * *", noon + HOURS) == noon + HOURS
    (tmp_path / schedule.FILE).write_text("{")
    assert schedule.in_force_since(tmp_path, "0 11 * * *", noon + 2 * HOURS) == noon + 2 * HOURS


LIFE = """
import asyncio, os, signal, sys
from datetime import datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from memory.night_records import Night, NightStatus
from serve import schedule
from serve.night import NightSchool
from serve.wiring import open_ledger
from tests.serve.fakes import settings_in

folder, die_at, start = Path(sys.argv[1]), sys.argv[2], datetime.fromisoformat(sys.argv[3])
ledger = open_ledger(settings_in(folder))
shift = start - datetime.now()

def clock():
    return datetime.now() + shift

def at(moment):
    if moment == die_at:
        os.kill(os.getpid(), signal.SIGKILL)

def begin():
    at("before")
    night = Night(created_at=clock().astimezone())
    ledger.add_night(night)
    at("begun")
    ledger.end_night(night.id, NightStatus.SKIPPED, ["a test"])
    at("ended")

nights = NightSchool(SimpleNamespace(ledger=ledger))
since = schedule.in_force_since(folder, "0 2 * * *", clock())

async def live():
    settled = lambda: max(since, nights.last_at_work() or since)
    keeper = schedule.keep("0 2 * * *", begin, settled, timedelta(hours=3), clock)
    await asyncio.wait_for(keeper, 5 if die_at == "never" else 60)

try:
    asyncio.run(live())
except TimeoutError:
    pass
"""


@pytest.mark.parametrize("die_at", ["before", "begun", "ended"])
def test_a_service_killed_at_the_hour_begins_one_night_for_it(die_at: str, tmp_path: Path) -> None:
    hour = MIDNIGHT + timedelta(hours=2)

    def lives(die_at: str, start: datetime) -> int:
        code = [sys.executable, "-c", LIFE, str(tmp_path), die_at, start.isoformat()]
        return subprocess.run(code, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120).returncode

    assert lives(die_at, hour - timedelta(seconds=0.3)) == -signal.SIGKILL
    assert lives("never", hour + timedelta(minutes=40)) == 0
    ledger = open_ledger(settings_in(tmp_path))
    assert len(ledger.nights()) == 1
    ledger.close()


def test_the_schedule_ends_with_the_service() -> None:
    async def live() -> int:
        async with schedule.kept("* * * * *", lambda: None, datetime.now):
            during = len(asyncio.all_tasks())
        return during - len(asyncio.all_tasks())

    assert asyncio.run(live()) == 1


@pytest.mark.parametrize("cron", ["at two", "0 2 * *", "0 2 * * * *", "61 2 * * *", "0 25 * * *", "0 2 30 2 *"])
def test_what_is_no_cron_expression_is_refused_at_the_start(cron: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIGHTSCHOOL_NIGHT__SCHEDULE", cron)
    with pytest.raises(ConfigError, match=r"night\.schedule"):
        load_settings()


def test_there_is_no_schedule_until_one_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().night.schedule is None
    monkeypatch.setenv("NIGHTSCHOOL_NIGHT__SCHEDULE", "0 2 * * *")
    assert load_settings().night.schedule == "0 2 * * *"
