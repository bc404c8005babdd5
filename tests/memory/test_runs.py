"""Runs and feedback found by what is asked of them, and not by reading all. On both databases."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from memory import runs
from memory.ledger import Ledger
from memory.records import Feedback, FeedbackKind, Outcome, OutcomeSource, Purpose, Step, Trajectory, Trust, now
from tests.memory import samples

DAYS = (Purpose.SERVE, Purpose.TEACHER)


def ran(ledger: Ledger, question: str = "What is 2 + 3?", **more: Any) -> Trajectory:
    task = samples.task(question)
    run = samples.trajectory(task).model_copy(update=more)
    ledger.add_run(task, run)
    return run


def told(ledger: Ledger, run: Trajectory, **said: Any) -> Feedback:
    word = samples.feedback(run).model_copy(update=said)
    ledger.add_feedback(word)
    return word


def test_runs_and_successes_are_counted_by_purpose(ledger: Ledger):
    assert runs.count(ledger.database, *DAYS) == runs.Counted(0, 0)
    full, half = (Outcome(score=score, by=OutcomeSource.VERIFIER) for score in (1.0, 0.9))
    one = ran(ledger, outcome=full)
    ran(ledger, outcome=half)
    ran(ledger, purpose=Purpose.TEACHER, outcome=full)
    ran(ledger, purpose=Purpose.EVAL, outcome=full)
    other = samples.task()
    ledger.add_task(other)
    ledger.add_trajectory(samples.trajectory(other))
    assert runs.count(ledger.database, *DAYS) == runs.Counted(4, 2)
    told(ledger, one)
    assert runs.count_feedback(ledger.database) == 1


def test_a_task_that_was_run_twice_is_one_task(ledger: Ledger):
    run = ran(ledger)
    ledger.add_trajectory(run.model_copy(update={"id": "traj_again"}))
    ran(ledger, purpose=Purpose.EVAL)
    assert runs.task_ids(ledger.database, *DAYS) == [run.task_id]


def test_runs_are_named_by_purpose_place_and_end(ledger: Ledger):
    old = ran(ledger, started_at=now() - timedelta(days=2), seconds=5.0)
    long = ran(ledger, started_at=now() - timedelta(days=2), seconds=86_400.0 * 1.5)
    ran(ledger, purpose=Purpose.EVAL)
    new = ran(ledger, purpose=Purpose.TEACHER)
    late = ran(ledger)
    upto = ledger.watermark()["trajectory"] - 1
    assert runs.run_ids(ledger.database, DAYS, upto_seq=upto) == {old.id, long.id, new.id}
    assert runs.run_ids(ledger.database, DAYS, after_seq=1, upto_seq=upto) == {long.id, new.id}
    yesterday = now() - timedelta(days=1)
    assert runs.run_ids(ledger.database, DAYS, upto_seq=upto, since=yesterday) == {long.id, new.id}
    everything = {old.id, late.id, new.id, "traj_unknown"}
    assert runs.by_id(ledger.database, everything, DAYS, upto_seq=upto) == {old.id: old, new.id: new}


def test_an_outlined_run_is_the_run_without_what_was_said(ledger: Ledger):
    run = ran(ledger, steps=[Step(message=1, token_ids=[1, 2])], answer="\u0000")
    found = runs.by_id(ledger.database, [run.id], DAYS, upto_seq=1, outlined=True)
    assert found == {run.id: run.model_copy(update={"messages": [], "steps": []})}


def test_the_newest_runs_are_those_written_last(ledger: Ledger):
    one, two, three = (ran(ledger, purpose=purpose) for purpose in (*DAYS, Purpose.SERVE))
    ran(ledger, purpose=Purpose.EVAL)
    found = runs.newest(ledger.database, DAYS, limit=2)
    assert [(run.id, run.messages) for run in found] == [(three.id, []), (two.id, [])]
    assert [run.id for run in runs.newest(ledger.database, DAYS, limit=2, upto_seq=2)] == [two.id, one.id]
    assert [run.id for run in runs.newest(ledger.database, (Purpose.SERVE,), limit=9)] == [three.id, one.id]
    assert runs.newest(ledger.database, DAYS, limit=2, tenant="eve") == []


def test_feedback_is_found_by_its_run_its_question_and_its_standing(ledger: Ledger):
    one, two, three = (ran(ledger, question) for question in ("Which?", "Which?", "Who?"))
    trusted = told(ledger, one, trust=Trust.TRUSTED)
    odd = told(ledger, two, value={"kind": "score", "trust": "quarantined"}, trust=Trust.REJECTED)
    early = told(ledger, three, kind=FeedbackKind.SCORE, value=1.0, created_at=now() - timedelta(days=2))
    late = told(ledger, three, kind=FeedbackKind.SCORE, value=0.0)
    database, upto = ledger.database, ledger.watermark()["feedback"] - 1
    assert runs.undecided(database, upto_seq=upto) == [early]
    assert runs.undecided(database, upto_seq=upto + 1) == [early, late]
    assert runs.spoken_of(database, upto_seq=upto) == {one.id, two.id, three.id}
    assert runs.spoken_of(database, after_seq=1, upto_seq=upto) == {two.id, three.id}
    yesterday = now() - timedelta(days=1)
    assert runs.spoken_of(database, upto_seq=upto, since=yesterday) == {one.id, two.id}
    asked = {ledger.get_task(one.task_id).fingerprint}
    of_questions = {"fingerprints": asked, "upto_seq": upto}
    assert runs.spoken_of_questions(database, kind=FeedbackKind.CORRECTION, **of_questions) == {one.id, two.id}
    assert runs.spoken_of_questions(database, kind=FeedbackKind.HINT, **of_questions) == set()
    assert runs.spoken_of_questions(database, set(), FeedbackKind.SCORE, upto_seq=upto) == set()
    on = runs.feedback_on(database, [three.id, one.id], upto_seq=upto)
    assert sorted(said.id for said in on) == sorted([trusted.id, early.id])
    assert runs.feedback_by_id(database, [odd.id, one.id]) == [odd]
