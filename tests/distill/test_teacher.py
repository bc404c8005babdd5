"""The teacher's runs teach what no own run solved, and are never taken for own ones."""

from __future__ import annotations

from typing import Any

import pytest

from distill.credit import credit
from distill.principles import past_runs
from distill.recipes import load
from distill.recipes.contrast import contrast
from distill.recipes.successes import successes
from distill.recipes.teacher import teacher
from memory.records import FeedbackKind, Outcome, OutcomeSource, Purpose, Task, Trajectory, Trust
from tests.distill.samples import feedback, say, snapshot, solve, task, trajectory


def by_teacher(of: Task, number: int, **fields: Any) -> Trajectory:
    marks = {"id": f"traj_teacher_{of.id}", "purpose": Purpose.TEACHER, "model": "teacher:openai/big"}
    return trajectory(of, solve(number), **{**marks, **fields})


def test_a_verified_run_of_the_teacher_is_an_example_whose_source_is_that_run() -> None:
    one = task(1)
    failed, taught = trajectory(one, [say("no idea")], score=0.0), by_teacher(one, 1)
    material = snapshot((one, failed), (one, taught))
    (example,) = teacher(material)
    assert example.sources == [taught.id]
    assert example.messages == [*one.messages, *solve(1)]
    assert list(successes(material)) == []
    assert material.trajectories == [failed]
    assert list(load(["teacher"])) == ["teacher"]


def test_the_own_failure_against_the_teachers_success_is_a_pair_and_memory_keeps_the_run() -> None:
    one = task(1)
    failed = trajectory(one, [*solve(7)[:2], say("8")], score=0.0)
    taught = by_teacher(one, 1)
    material = snapshot((one, failed), (one, taught))
    (pair,) = contrast(material)
    assert pair.sources == sorted([failed.id, taught.id])
    (kept,) = past_runs(material)
    assert kept.sources == [taught.id]


def test_a_question_that_an_own_run_solved_needs_no_teacher() -> None:
    one = task(1)
    assert list(teacher(snapshot((one, trajectory(one, solve(1))), (one, by_teacher(one, 1))))) == []


@pytest.mark.parametrize(
    ("outcome", "teaches"),
    [
        (None, False),
        (Outcome(score=0.5, by=OutcomeSource.VERIFIER), False),
        (Outcome(score=1.0, by=OutcomeSource.CRITIC), False),
        (Outcome(score=1.0, by=OutcomeSource.TEACHER), True),
        (Outcome(score=1.0, by=OutcomeSource.VERIFIER), True),
    ],
)
def test_it_teaches_only_once_something_vouches_for_it(outcome: Outcome | None, teaches: bool) -> None:
    one = task(1)
    assert bool(list(teacher(snapshot((one, by_teacher(one, 1, outcome=outcome)))))) is teaches


@pytest.mark.parametrize(
    ("authors", "trusted_by_settings", "teaches"),
    [
        (["ann"], False, False),
        (["anonymous"], False, False),
        (["ann", "anonymous"], False, False),
        (["ann", "bob"], False, True),
        (["operator"], False, True),
        (["ann"], True, True),
    ],
)
def test_what_one_user_had_it_say_and_praised_is_not_taught(
    authors: list[str], trusted_by_settings: bool, teaches: bool
) -> None:
    """Nor remembered, nor put over an own run; what the operator's settings trust needs no second voice."""
    one = task(1, reference=None)
    trust = Outcome(score=1.0, by=OutcomeSource.TEACHER) if trusted_by_settings else None
    taught = by_teacher(one, 1, outcome=trust)
    failed = trajectory(one, [*solve(7)[:2], say("8")], score=0.0)
    praise = [feedback(taught, FeedbackKind.SCORE, 1.0, author, trust=Trust.TRUSTED) for author in authors]
    material = snapshot((one, failed), (one, taught), said=praise)
    for made in (list(teacher(material)), past_runs(material), list(contrast(material))):
        assert bool(made) is teaches
    for example in teacher(material):
        assert example.sources == [taught.id, *sorted(word.id for word in praise)]


def test_held_out_tasks_and_failed_teachers_make_nothing_of_anybody() -> None:
    one = task(1)
    failed = by_teacher(one, 1, outcome=Outcome(score=0.0, by=OutcomeSource.VERIFIER))
    own = trajectory(one, solve(1))
    # A teacher that failed is no failure of ours: there is no pair against it.
    assert list(contrast(snapshot((one, own), (one, failed)))) == []


def test_a_word_on_the_teachers_reply_is_judged_as_on_any_other() -> None:
    one = task(1)
    run = by_teacher(one, 1, outcome=None)
    said = feedback(run, FeedbackKind.SCORE, 0)
    (judged,) = credit([said], [run], {one.id: one}, lambda _task, _answer: None)
    assert judged.trust is Trust.TRUSTED
