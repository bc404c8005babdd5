"""The night as one durable workflow: DBOS runs the stages in order and, after a crash, goes on where it was.

A stage's output is in the ledger before the stage counts as done. Ending is one ledger transition, so a
night ends exactly once.
"""

from __future__ import annotations

import logging
import time
from datetime import datetime
from typing import Any

from dbos import DBOS, SetWorkflowID

from memory.errors import ConflictError, NightschoolError, NotEnoughExperienceError
from memory.night_records import GenerationStatus, Night, NightStatus, StageRun
from serve import durable
from serve.events import emitter
from serve.stages import STAGES, stages_of
from serve.stages.night_run import CancelledNightError, NightRun, Output, OverBudgetError
from serve.stages.practice import PRACTICE
from serve.wiring import Services

log = logging.getLogger(__name__)


class NightSchool:
    """Starts, resumes and cancels nights, one at a time."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def start(self, options: dict[str, Any]) -> Night:
        """Begin a night; ConflictError while another one runs."""
        running = self.running()
        if running is not None:
            raise ConflictError(f"night {running.id} is running; wait for it or cancel it")
        tasks = self._services.settings.night.practice
        practises = {PRACTICE: tasks} if tasks and "training_file" not in options else {}
        night = Night(options={**options, **practises})
        self._services.ledger.add_night(night)
        _go(night)
        return night

    def running(self) -> Night | None:
        """The night that has not ended, if there is one."""
        unfinished = [n for n in self._services.ledger.nights() if n.status is NightStatus.RUNNING]
        return unfinished[-1] if unfinished else None

    def newest(self) -> datetime | None:
        """When the newest night began, on the machine's own (naive) clock."""
        nights = self._services.ledger.nights()
        return nights[-1].created_at.astimezone().replace(tzinfo=None) if nights else None

    def resume(self) -> None:
        """At start: a night that the ledger knows as running goes on (DBOS skips the steps that are done)."""
        night = self.running()
        if night is not None:
            _go(night)

    def cancel(self, night_id: str) -> None:
        """Ask a night to stop; ConflictError when it has ended."""
        if self._services.ledger.night(night_id).status is not NightStatus.RUNNING:
            raise ConflictError(f"night {night_id} has ended already")
        folder = self._services.settings.night_dir(night_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cancel").touch()


def _go(night: Night) -> None:
    with SetWorkflowID(night.id):
        DBOS.start_workflow(run_night, night.id)


@DBOS.workflow()
def run_night(night_id: str) -> str:
    """All stages, then the end. An expected error ends the night as failed or skipped, with its reason; what goes wrong
    because the service goes down does not: the night goes on at the next start."""
    wait = durable.waiter()
    try:
        for name in stages_of(durable.services().ledger.night(night_id)):
            run_stage(night_id, name)
    except NightschoolError as exc:
        wait.check()
        status = (
            NightStatus.SKIPPED
            if isinstance(exc, NotEnoughExperienceError | OverBudgetError)
            else NightStatus.CANCELLED
            if isinstance(exc, CancelledNightError)
            else NightStatus.FAILED
        )
        return end_night(night_id, status, [str(exc)])
    except Exception as exc:
        wait.check()
        log.exception("night %s hit a bug", night_id)
        return end_night(night_id, NightStatus.FAILED, [f"{type(exc).__name__}: {exc}"])
    return end_night(night_id, None, [])


@DBOS.step()
def run_stage(night_id: str, name: str) -> None:
    """One stage, unless the ledger has its output already."""
    ledger = durable.services().ledger
    if ledger.stage(night_id, name) is not None:
        return
    run = _night_run(night_id)
    if run.cancelled():
        raise CancelledNightError("the night was cancelled")
    run.emit(name, "started")
    started = time.monotonic()
    output = STAGES[name](run)
    ledger.record_stage(StageRun(night_id=night_id, stage=name, output=output, seconds=time.monotonic() - started))


@DBOS.step()
def end_night(night_id: str, status: NightStatus | None, reasons: list[str]) -> str:
    """The night's last word. `status` None: as the gate decided."""
    ledger = durable.services().ledger
    decision = ledger.stage(night_id, "decide")
    published = ledger.stage(night_id, "publish")
    if status is None:
        promoted = published is not None and published.output["promoted"]
        status = NightStatus.PROMOTED if promoted else NightStatus.REJECTED
        reasons = list(decision.output["reasons"]) if decision else reasons
    candidate = ledger.night(night_id).candidate
    if candidate is not None and ledger.generation(candidate).status is GenerationStatus.CANDIDATE:
        ledger.advance_generation(candidate, GenerationStatus.REJECTED)
    written = ledger.stage(night_id, "report")
    path = written.output["path"] if written else None
    ledger.end_night(night_id, status, reasons, candidate=candidate, report_path=path)
    _night_run(night_id).emit("end", status.value, reasons=reasons)
    return status.value


def _night_run(night_id: str) -> NightRun:
    services = durable.services()
    ledger = services.ledger

    def done(stage: str) -> Output:
        finished = ledger.stage(night_id, stage)
        assert finished is not None, f"stage {stage} of {night_id} has not run"
        return finished.output

    emit = emitter(services.settings.night_dir(night_id))
    return NightRun(services, ledger.night(night_id), emit, done, check=durable.waiter().check)
