"""A night after days on which nothing went wrong trains nothing, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evals.suites import EvalTask, Suite, save_suite
from memory.errors import NotEnoughExperienceError
from memory.ledger import Ledger
from memory.night_records import Night, NightStatus, StageRun
from memory.records import Feedback, FeedbackKind, Outcome, OutcomeSource, Purpose, Trajectory, Trust
from serve import promotion
from serve.stages.material import load_snapshot, snapshot
from serve.stages.practice import practise
from serve.stages.worth import nothing_new
from serve.suites import configured_suites
from serve.wiring import open_ledger
from tests.memory import samples
from tests.serve.fakes import settings_in
from tests.serve.test_material import promoted
from tests.serve.test_night_limits import night_in

QUESTION, HELD_OUT = "What is 2 + 3?", "Which number comes after four?"


@pytest.fixture
def ledger(tmp_path: Path) -> Iterator[Ledger]:
    settings = settings_in(tmp_path)
    opened = open_ledger(settings)
    promotion.ensure_base(opened, settings.model)
    exam = Suite(name="held_out", role="held_out", tasks=[EvalTask(key="4", task=samples.task(HELD_OUT))])
    save_suite(exam, settings.suites_dir / "held_out.jsonl")
    yield opened
    opened.close()


def ran(ledger: Ledger, question: str = QUESTION, score: float | None = 1.0, **changed: Any) -> Trajectory:
    task = samples.task(question)
    outcome = None if score is None else Outcome(score=score, by=OutcomeSource.VERIFIER)
    run = samples.trajectory(task).model_copy(update={"outcome": outcome, **changed})
    ledger.add_run(task, run)
    return run


def said(ledger: Ledger, run: Trajectory, kind: FeedbackKind, value: Any, trust: Trust = Trust.TRUSTED) -> None:
    ledger.add_feedback(Feedback(trajectory_id=run.id, kind=kind, value=value, author="ann", trust=trust))


def why(ledger: Ledger, folder: Path, options: dict[str, Any] | None = None, **config: Any) -> str | None:
    """What a night with these options and settings would say now."""
    night = Night(options=options or {})
    run = night_in(ledger, folder, [], night, **config)
    ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output=snapshot(run), seconds=0.0))
    found = nothing_new(run, load_snapshot(run))
    ledger.end_night(night.id, NightStatus.SKIPPED, [])
    return found


def test_successes_alone_are_nothing_new_unless_the_settings_say_so(ledger: Ledger, tmp_path: Path) -> None:
    ran(ledger)
    assert "no new run failed" in str(why(ledger, tmp_path))
    assert why(ledger, tmp_path, min_failures=0) is None


@pytest.mark.parametrize("train_from", ["champion", "base"])
def test_a_failure_is_new_until_a_promoted_night_has_learned_it(
    ledger: Ledger, tmp_path: Path, train_from: str
) -> None:
    ran(ledger, score=0.0)
    assert why(ledger, tmp_path, train_from=train_from) is None
    assert "only 1 of the new runs" in str(why(ledger, tmp_path, train_from=train_from, min_failures=2))
    assert why(ledger, tmp_path, train_from=train_from) is None
    promoted(ledger, tmp_path, 1)
    ran(ledger, "What is 4 + 1?")
    assert why(ledger, tmp_path, train_from=train_from) is not None
    # Whoever names a date means all that came after it.
    assert why(ledger, tmp_path, {"since": "2020-01-01T00:00:00+00:00"}, train_from=train_from) is None


@pytest.mark.parametrize("kind", [FeedbackKind.CORRECTION, FeedbackKind.HINT])
def test_a_trusted_word_on_how_it_should_have_gone_is_new_also_about_an_old_run(
    ledger: Ledger, tmp_path: Path, kind: FeedbackKind
) -> None:
    old = ran(ledger)
    promoted(ledger, tmp_path, 1)
    said(ledger, old, kind, "Carry the one.", Trust.QUARANTINED)
    assert why(ledger, tmp_path) is not None
    said(ledger, old, kind, "Carry the one.")
    assert why(ledger, tmp_path) is None


def test_a_complaint_about_a_run_that_nothing_judged_is_a_failure(ledger: Ledger, tmp_path: Path) -> None:
    run = ran(ledger, score=None)
    assert why(ledger, tmp_path) is not None
    said(ledger, run, FeedbackKind.SCORE, 0)
    assert why(ledger, tmp_path) is None


def test_a_run_of_the_teacher_is_new(ledger: Ledger, tmp_path: Path) -> None:
    ran(ledger, purpose=Purpose.TEACHER)
    assert why(ledger, tmp_path) is None


def test_a_failure_that_is_kept_for_the_exam_teaches_nothing(ledger: Ledger, tmp_path: Path) -> None:
    ran(ledger, HELD_OUT, score=0.0)
    assert why(ledger, tmp_path) is not None


@pytest.mark.parametrize(
    ("options", "config"),
    [({"recipes": ["successes"]}, {}), ({"practice": 3}, {}), ({}, {"practice": 3})],
)
def test_a_night_that_was_told_what_to_learn_or_practises_goes_on(
    ledger: Ledger, tmp_path: Path, options: dict[str, Any], config: dict[str, Any]
) -> None:
    ran(ledger)
    assert why(ledger, tmp_path, options, **config) is None


def test_what_was_forgotten_has_to_leave_the_weights_whatever_the_day_brought(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(ledger)
    monkeypatch.setattr("serve.stages.worth.must_start_from_base", lambda *_: True)
    assert why(ledger, tmp_path) is None


def test_while_a_canary_is_on_trial_no_night_takes_its_place_unless_it_was_told_what_to_learn(
    ledger: Ledger, tmp_path: Path
) -> None:
    ran(ledger, score=0.0)
    ledger.add_generation(samples.generation(1))
    ledger.begin_canary(1, 0.1, why="test", by="night")
    assert "generation 1 is on trial" in str(why(ledger, tmp_path))
    assert "generation 1 is on trial" in str(why(ledger, tmp_path, min_failures=0))
    assert why(ledger, tmp_path, {"recipes": ["corrections"]}) is None
    assert why(ledger, tmp_path, {"since": "2020-01-01T00:00:00+00:00"}) is None
    ledger.end_canary("enough", "operator")
    assert why(ledger, tmp_path) is None


def test_nor_does_it_practise_meanwhile(ledger: Ledger, tmp_path: Path) -> None:
    ledger.add_generation(samples.generation(1))
    ledger.begin_canary(1, 0.1, why="test", by="night")
    with pytest.raises(NotEnoughExperienceError, match="on trial"):
        practise(night_in(ledger, tmp_path, [], Night(options={"practice": 3})))


def test_a_canary_that_knows_what_was_forgotten_is_replaced(
    ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran(ledger, score=0.0)
    ledger.add_generation(samples.generation(1))
    ledger.begin_canary(1, 0.1, why="test", by="night")
    monkeypatch.setattr("serve.stages.material.must_start_from_base", lambda _, of: of.number == 1)
    assert why(ledger, tmp_path) is None


def rejected(ledger: Ledger, folder: Path, verdict: str, exam: dict[str, str]) -> None:
    """A night that drew its line here and was judged by these suites (name -> hash)."""
    night = Night()
    run = night_in(ledger, folder, [], night)
    outputs = {"snapshot": snapshot(run), "evaluate": {"suites": exam}, "decide": {"verdict": verdict}}
    for stage, output in outputs.items():
        ledger.record_stage(StageRun(night_id=night.id, stage=stage, output=output, seconds=0.0))
    ledger.end_night(night.id, NightStatus.REJECTED, ["no better"])


def test_what_a_night_was_rejected_for_is_not_tried_again_before_something_comes_besides(
    ledger: Ledger, tmp_path: Path
) -> None:
    ran(ledger, score=0.0)
    rejected(ledger, tmp_path, "reject", {})
    ran(ledger, "What is 4 + 1?")
    assert "taken again with --since" in str(why(ledger, tmp_path))
    assert why(ledger, tmp_path, {"since": "2020-01-01T00:00:00+00:00"}) is None
    failed = ran(ledger, "What is 4 + 2?", score=0.0)
    assert why(ledger, tmp_path) is None
    # And then from all of it.
    night = Night()
    run = night_in(ledger, tmp_path, [], night)
    ledger.record_stage(StageRun(night_id=night.id, stage="snapshot", output=snapshot(run), seconds=0.0))
    assert {failed.id} < {t.id for t in load_snapshot(run).trajectories}


def test_where_evidence_was_wanting_a_larger_exam_is_worth_another_try(ledger: Ledger, tmp_path: Path) -> None:
    ran(ledger, score=0.0)
    exam = {suite.name: suite.hash for suite in configured_suites(settings_in(tmp_path), ledger)}
    rejected(ledger, tmp_path, "not_enough_evidence", exam | {"held_out": "a smaller one"})
    assert why(ledger, tmp_path) is None
    rejected(ledger, tmp_path, "not_enough_evidence", exam)
    assert "nothing new to learn" in str(why(ledger, tmp_path))
