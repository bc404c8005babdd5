"""The night as one durable workflow: DBOS runs the stages in order and, after a crash, goes on where it was.

A stage's output is in the ledger before the stage counts as done. Ending is one ledger transition, so a
night ends exactly once.
"""

from __future__ import annotations

import logging
import time
from contextlib import suppress
from datetime import datetime
from typing import Any

from dbos import DBOS, SetWorkflowID

from memory.errors import ConflictError, NightschoolError, NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import GenerationStatus, Night, NightStatus, StageRun
from serve import durable
from serve.events import emitter
from serve.stages import STAGES, stages_of
from serve.stages.night_run import CancelledNightError, NightRun, Output, OverBudgetError
from serve.stages.practice import practice_options
from serve.wiring import Services

log = logging.getLogger(__name__)

CANCELLED = "the night was cancelled"


class NightSchool:
    """Starts, resumes and cancels nights, one at a time."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def start(self, options: dict[str, Any]) -> Night:
        """Begin a night; ConflictError while another one runs."""
        night = Night(options={**options, **practice_options(self._services.settings, options)})
        self._services.ledger.add_night(night)
        try:
            _go(night)
        except Exception as exc:
            # Else it would count as running, and no other night could begin before the next start.
            if not _at_work(night.id):
                told = f"it could not be begun: {type(exc).__name__}: {exc}"
                self._services.ledger.end_night(night.id, NightStatus.FAILED, [told])
            raise
        return night

    def running(self) -> Night | None:
        """The night that has not ended, if there is one."""
        unfinished = [n for n in self._services.ledger.nights() if n.status is NightStatus.RUNNING]
        return unfinished[-1] if unfinished else None

    def last_at_work(self) -> datetime | None:
        """When the newest night ended or, while it runs, began; on the machine's own (naive) clock."""
        nights = self._services.ledger.nights()
        known = (nights[-1].created_at, nights[-1].ended_at) if nights else ()
        # The later one by the clock on the wall, which went back where summer time ended meanwhile.
        return max((at.astimezone().replace(tzinfo=None) for at in known if at is not None), default=None)

    def resume(self) -> None:
        """At start: a night that the ledger knows as running goes on (DBOS skips the steps that are done)."""
        night = self.running()
        if night is None:
            return
        _go(night)
        if is_over(night.id):
            # Unless the night was only quicker than this line, its end did not get into the ledger.
            with suppress(ConflictError):
                end_night(night.id, NightStatus.FAILED, ["its end could not be written; the service's log says why"])

    def cancel(self, night_id: str) -> None:
        """Ask a night to stop; ConflictError when it has ended. Behind its decision it goes to its end."""
        if self._services.ledger.night(night_id).status is not NightStatus.RUNNING:
            raise ConflictError(f"night {night_id} has ended already")
        folder = self._services.settings.night_dir(night_id)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "cancel").touch()
        if is_over(night_id):
            end_night(night_id, NightStatus.CANCELLED, [CANCELLED])


def is_over(night_id: str) -> bool:
    """Whether no workflow works on the night (any more), whatever the ledger says."""
    workflow = DBOS.get_workflow_status(night_id)
    return workflow is None or workflow.status not in ("PENDING", "ENQUEUED")


def _at_work(night_id: str) -> bool:
    try:
        return not is_over(night_id)
    except Exception:  # Nobody knows, and a night that ended must not go on: the next start resumes it.
        return True


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
    if run.cancelled() and not _is_decided(ledger, run.night, name):
        raise CancelledNightError(CANCELLED)
    run.emit(name, "started")
    started = time.monotonic()
    try:
        output = STAGES[name](run)
    except Exception:
        # DBOS keeps an error as the step's result: what goes wrong because the service goes down is none.
        run.check()
        raise
    ledger.record_stage(StageRun(night_id=night_id, stage=name, output=output, seconds=time.monotonic() - started))


def _is_decided(ledger: Ledger, night: Night, stage: str) -> bool:
    """Whether the night's decision was carried out before this stage: it is too late to cancel."""
    if stage != "publish" or night.candidate is None:
        return stage == "report"
    return ledger.generation(night.candidate).status is not GenerationStatus.CANDIDATE


@DBOS.step()
def end_night(night_id: str, status: NightStatus | None, reasons: list[str]) -> str:
    """The night's last word. `status` None: as the gate decided. What was decided and done stays so, whatever went
    wrong behind it: the next night must know what the champion has learned. `reasons` then stand beside the gate's."""
    ledger = durable.services().ledger
    decision, published = ledger.stage(night_id, "decide"), ledger.stage(night_id, "publish")
    candidate = ledger.night(night_id).candidate
    switched = candidate is not None and not _rejected(ledger, candidate)
    if decision is not None:
        promoted = published.output["promoted"] if published else switched and decision.output["verdict"] == "promote"
        if published or promoted:
            status = NightStatus.PROMOTED if promoted else NightStatus.REJECTED
            reasons = [*decision.output["reasons"], *reasons]
    assert status is not None, f"night {night_id} has published nothing"
    written = ledger.stage(night_id, "report")
    path = written.output["path"] if written else None
    ledger.end_night(night_id, status, reasons, candidate=candidate, report_path=path)
    _night_run(night_id).emit("end", status.value, reasons=reasons)
    return status.value


def _rejected(ledger: Ledger, candidate: int) -> bool:
    """Reject a generation that does not serve. False for one that does, or did: a switch that the night no longer
    waited for may have come first."""
    try:
        ledger.advance_generation(candidate, GenerationStatus.REJECTED)
    except ConflictError:
        return False
    return True


def _night_run(night_id: str) -> NightRun:
    services = durable.services()
    ledger = services.ledger

    def done(stage: str) -> Output:
        finished = ledger.stage(night_id, stage)
        assert finished is not None, f"stage {stage} of {night_id} has not run"
        return finished.output

    emit = emitter(services.settings.night_dir(night_id))
    return NightRun(services, ledger.night(night_id), emit, done, check=durable.waiter().check)
