"""A service that is told to stop while a night trains: the trainer goes down with it, and the night goes on later."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import psutil

from memory.night_records import NightStatus
from serve.server import DRAIN_S
from serve.wiring import open_ledger
from tests.serve.fakes import running
from tests.serve.night_life import NIGHT, pupil_of, settings_for
from tests.serve.test_night_killed import evening


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 120
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_service_that_stops_ends_its_trainer_and_the_night_trains_at_the_next_start(tmp_path: Path) -> None:
    folder = evening(tmp_path / "evening")
    settings, endless = settings_for(folder), folder / "endless-trainer"
    endless.write_text(f'#!/bin/sh\necho $$ > "{folder}/half"\nmv "{folder}/half" "{folder}/pid"\nexec sleep 600\n')
    endless.chmod(0o755)
    with running(settings.model_copy(update={"trainer_python": endless}), pupil_of({})):
        until((folder / "pid").exists)
        trainer = psutil.Process(int((folder / "pid").read_text()))
        stopping = time.monotonic()
    until(lambda: not trainer.is_running() or trainer.status() == psutil.STATUS_ZOMBIE)
    assert time.monotonic() - stopping < DRAIN_S

    ledger = open_ledger(settings)
    assert ledger.night(NIGHT).status is NightStatus.RUNNING
    assert [run.stage for run in ledger.stages(NIGHT)][-1] == "dataset"
    ledger.close()
    with running(settings, pupil_of({})) as (_, services):
        ledger = services.ledger
        until(lambda: ledger.stage(NIGHT, "train") is not None or ledger.night(NIGHT).status is not NightStatus.RUNNING)
        assert ledger.stage(NIGHT, "train") is not None, ledger.night(NIGHT).reasons
