"""How long a running night is said to take, by its own pace and by the last night's stages."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from memory.ledger import Ledger
from memory.night_records import Night, NightStatus, StageRun
from memory.records import now
from serve.eta import Standing, standing
from serve.wiring import open_ledger
from tests.serve.fakes import settings_in

BEGAN = now()
TOOK = {
    "snapshot": 1.0, "credit": 1.0, "principles": 10.0, "dataset": 8.0, "train": 100.0, "evaluate": 300.0,
    "decide": 1.0, "publish": 3.0, "report": 1.0,
}  # fmt: skip


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    opened = open_ledger(settings_in(tmp_path))
    yield opened
    opened.close()


def slept(ledger: Ledger, took: dict[str, float]) -> None:
    night = Night()
    ledger.add_night(night)
    for stage, seconds in took.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output={}, seconds=seconds))
    ledger.end_night(night.id, NightStatus.REJECTED, [])


def event(second: float, stage: str, message: str = "", **data: Any) -> dict[str, Any]:
    return {"at": moment(second).isoformat(), "stage": stage, "message": message, "data": data}


def moment(second: float) -> datetime:
    return BEGAN + timedelta(seconds=second)


def at(ledger: Ledger, second: float, *events: dict[str, Any], **options: Any) -> Standing:
    return standing(ledger, Night(options=options), list(events), moment(second))


def test_the_first_night_knows_its_own_pace_alone(ledger: Ledger) -> None:
    assert at(ledger, 0) == Standing(stage="snapshot")
    trains = event(10, "train", "step", step=2, steps=10, eta_s=80.0)
    assert at(ledger, 20, trains) == Standing(stage="train", done=2, total=10, left_s=70)
    runs = [event(n, "evaluate", "gen", done=n % 5, total=5, stage_done=n, stage_total=40) for n in range(11)]
    assert at(ledger, 10, *runs) == Standing(stage="evaluate", done=10, total=40, left_s=30)


def test_what_is_to_come_takes_as_long_as_in_the_last_night_that_had_it(ledger: Ledger) -> None:
    slept(ledger, TOOK)
    # Neither skipped before it trained, nor died before its end, is a night to go by.
    slept(ledger, {"snapshot": 1.0, "credit": 1.0})
    slept(ledger, {stage: 9999.0 for stage in ("snapshot", "credit", "principles", "dataset", "train")})
    began = event(0, "dataset", "started")
    assert at(ledger, 3, began) == Standing(stage="dataset", left_s=5, night_left_s=410)
    assert at(ledger, 30, began).left_s == 0
    trains = event(10, "train", "step", step=2, steps=10, eta_s=80.0)
    assert (at(ledger, 20, trains).left_s, at(ledger, 20, trains).night_left_s) == (70, 375)


def test_an_exam_goes_by_the_last_one_until_its_own_pace_is_known(ledger: Ledger) -> None:
    slept(ledger, TOOK)
    began = event(0, "evaluate", "started")
    counts = [event(n, "evaluate", "gen", done=n, total=100, stage_done=n, stage_total=100) for n in range(21)]
    assert at(ledger, 5, began, *counts[:6]) == Standing(
        stage="evaluate", done=5, total=100, left_s=295, night_left_s=300
    )
    assert (at(ledger, 20, began, *counts).left_s, at(ledger, 20, began, *counts).night_left_s) == (80, 85)


def test_the_hours_between_two_attempts_at_a_stage_are_no_pace(ledger: Ledger) -> None:
    before = [event(0, "evaluate", "started"), event(1, "evaluate", "gen", stage_done=0, stage_total=100)]
    again = [event(9000, "evaluate", "started"), event(9000, "evaluate", "gen", stage_done=40, stage_total=100)]
    again.append(event(9010, "evaluate", "gen", stage_done=60, stage_total=100))
    assert at(ledger, 9010, *before, *again).left_s == 20


def test_practice_that_nobody_has_timed_leaves_the_nights_end_unknown_until_it_is_over(ledger: Ledger) -> None:
    slept(ledger, TOOK)
    assert at(ledger, 0, event(0, "principles", "started"), practice=4).night_left_s is None
    tries = [event(n, "practice", "trying", done=n, total=40) for n in range(11)]
    assert at(ledger, 10, *tries, practice=4) == Standing(
        stage="practice", done=10, total=40, left_s=30, night_left_s=30 + 413
    )
    assert at(ledger, 0, event(0, "dataset", "started"), practice=4).night_left_s == 413


def test_a_night_that_is_over_has_nothing_left(ledger: Ledger) -> None:
    assert at(ledger, 0, event(0, "end", "rejected")) == Standing(stage="end")
