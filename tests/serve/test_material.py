"""Where a night draws its line, and what it can be judged by."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evals.suites import EvalTask, Suite, save_suite
from memory.errors import ConflictError, NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus, Night, NightStatus, StageRun
from memory.records import Feedback, FeedbackKind, Purpose, StopReason, Task, Trajectory, Trust, VerifierSpec
from serve.stages.material import load_snapshot, snapshot
from serve.suites import held_out_from_days
from serve.wiring import keep_task
from tests.serve.fakes import settings_in
from tests.serve.test_night_limits import ledger, night_in, ran

__all__ = ["ledger"]


def promoted(ledger: Ledger, folder: Path, number: int, **options: Any) -> None:
    """A night that drew its line here and promoted generation `number`."""
    night = Night(options=options)
    drawn = snapshot(night_in(ledger, folder, [], night))
    ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output=drawn, seconds=0.0))
    made: dict[str, Any] = {"parent": number - 1, "night_id": night.id, "status": GenerationStatus.CANDIDATE}
    ledger.add_generation(Generation(number=number, base_model="m", **made))
    ledger.promote(number, why="better", by="night")
    ledger.end_night(night.id, NightStatus.PROMOTED, [], candidate=number, report_path=None)


def waiting(ledger: Ledger, folder: Path) -> int:
    """Runs that a night now would find new."""
    run = night_in(ledger, folder, [])
    found = snapshot(run)["runs"]
    ledger.end_night(run.night.id, NightStatus.SKIPPED, [])
    return found


@pytest.mark.parametrize(
    "options", [{"training_file": "file-1"}, {"since": "2026-01-01T00:00:00+00:00"}, {"recipes": ["successes"]}]
)
def test_a_night_that_left_something_out_leaves_the_day_to_be_learned(
    ledger: Ledger, tmp_path: Path, options: dict[str, Any]
) -> None:
    ran(ledger, "What is 1 + 1?", 1)
    promoted(ledger, tmp_path, 1, **options)
    assert waiting(ledger, tmp_path) == 1
    promoted(ledger, tmp_path, 2)
    assert waiting(ledger, tmp_path) == 0


def praised(ledger: Ledger, author: str) -> Trajectory:
    run = ran(ledger, "Who wrote it?", 1)
    word: dict[str, Any] = {"kind": FeedbackKind.SCORE, "value": 1.0, "trust": Trust.TRUSTED}
    ledger.add_feedback(Feedback(trajectory_id=run.id, author=author, **word))
    return run


@pytest.mark.parametrize(("later", "taught"), [("bob", True), ("ann", False)])
def test_an_answer_that_another_user_praised_before_an_earlier_night_is_taught(
    ledger: Ledger, tmp_path: Path, later: str, taught: bool
) -> None:
    exam = EvalTask(key="k", task=Task(messages=[{"role": "user", "content": "What is 4 - 2?"}], reference="2"))
    save_suite(Suite(name="held_out", role="held_out", tasks=[exam]), settings_in(tmp_path).suites_dir / "h.jsonl")
    praised(ledger, "ann")
    promoted(ledger, tmp_path, 1)
    again = praised(ledger, later)
    run = night_in(ledger, tmp_path, [], controls=[])
    ledger.record_stage(StageRun(night_id=run.night.id, stage="snapshot", output=snapshot(run), seconds=0.0))
    material = load_snapshot(run)
    assert [t.id for t in material.trajectories] == [again.id]
    assert [t.id for t, _, _ in material.own_successes()] == [again.id] * taught


def test_an_exams_task_that_a_user_asked_before_is_the_same_task(ledger: Ledger) -> None:
    exam = Task(messages=[{"role": "user", "content": "1 + 1?"}], reference="2", source="held_out")
    ledger.add_task(exam.model_copy(update={"caller": "key:shop", "user": "ann", "source": "chat"}))
    keep_task(ledger, exam)
    assert ledger.get_task(exam.id).caller == "key:shop"
    with pytest.raises(ConflictError):
        keep_task(ledger, exam.model_copy(update={"reference": "3"}))


def test_a_task_that_nobody_can_judge_is_not_held_out(ledger: Ledger) -> None:
    def asked(name: str, verifier: str, reference: str | None = None, **args: Any) -> Task:
        spec = VerifierSpec(name=verifier, args=args)
        task = Task(messages=[{"role": "user", "content": name}], verifier=spec, reference=reference)
        run = Trajectory(
            task_id=task.id, generation=0, model="base", messages=task.messages, stop_reason=StopReason.ANSWER,
            answer="many", purpose=Purpose.SERVE,
        )  # fmt: skip
        ledger.add_task(task)
        ledger.add_trajectory(run)
        return task

    asked("no number", "numeric", "many")
    asked("no pattern", "regex", pattern="(")
    asked("no reference", "exact")
    with pytest.raises(NotEnoughExperienceError):
        held_out_from_days(ledger, 1.0)
    sound = asked("sound", "numeric", "3")
    assert [item.task.id for item in held_out_from_days(ledger, 1.0).tasks] == [sound.id]
