"""The snapshot: its order, what it leaves out, how well a run went, what is held out."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.snapshot import Snapshot, corrections_of, outcome_of, score_of
from memory.records import FeedbackKind, Outcome, OutcomeSource, Purpose, Trust
from tests.distill.samples import at, correction, feedback, say, snapshot, solve, task, trajectory

SCORE = FeedbackKind.SCORE


def test_records_are_in_the_order_of_their_ids_whatever_order_they_came_in():
    tasks = [task(n) for n in (3, 1, 2)]
    made = Snapshot([trajectory(t, solve(1)) for t in tasks], [], {t.id: t for t in tasks})
    assert [t.task_id for t in made.trajectories] == ["task_0001", "task_0002", "task_0003"]
    assert list(made.tasks) == ["task_0001", "task_0002", "task_0003"]


def test_evaluation_runs_untrusted_feedback_and_other_tenants_words_are_left_out():
    one, two = task(1), task(2)
    served = trajectory(one, solve(1))
    evaluated = trajectory(two, solve(2), purpose=Purpose.EVAL)
    foreign = trajectory(one, solve(1), id="traj_foreign", tenant="other")
    said = [
        feedback(served, SCORE, 1.0),
        correction(served, "2", author="bob", trust=Trust.REJECTED),
        correction(served, "2", author="eve", tenant="other"),
    ]
    made = Snapshot([served, evaluated, foreign], said, {"task_0001": one, "task_0002": two})
    assert made.trajectories == [served]
    assert made.feedback == []


def test_a_verifier_outranks_users_and_users_outrank_a_critic():
    one = task(1)
    verified = trajectory(one, [say("5")], score=0.0)
    up = feedback(verified, SCORE, True, trust=Trust.TRUSTED)
    assert outcome_of(verified, [up]) == verified.outcome
    criticised = trajectory(one, [say("5")], outcome=Outcome(score=1.0, by=OutcomeSource.CRITIC))
    down = feedback(criticised, SCORE, 0.0, trust=Trust.TRUSTED)
    judged = outcome_of(criticised, [down])
    assert judged is not None
    assert (judged.by, judged.score) == (OutcomeSource.USER, 0.0)
    assert outcome_of(criticised, []) == criticised.outcome


def test_users_who_disagree_make_no_success_and_an_author_may_change_their_mind():
    run = trajectory(task(1), [say("2")], score=None)
    up = feedback(run, SCORE, 1.0, "ann", trust=Trust.TRUSTED)
    down = feedback(run, SCORE, 0.0, "bob", trust=Trust.TRUSTED, created_at=at(1))
    mixed = outcome_of(run, [up, down])
    assert mixed is not None
    assert not mixed.success
    better = feedback(run, SCORE, 1.0, "bob", id="fb_z", trust=Trust.TRUSTED, created_at=at(2))
    agreed = outcome_of(run, [better, down, up])
    assert agreed is not None
    assert agreed.success
    assert outcome_of(run, [feedback(run, SCORE, 1.0)]) is None, "quarantined words do not count"


@pytest.mark.parametrize(("value", "failed"), [("3", True), (" 2 ", False), (solve(1), False)])
def test_a_trusted_correction_with_another_answer_says_that_the_run_failed(value, failed):
    run = trajectory(task(1), [say("2")], score=None)
    judged = outcome_of(run, [correction(run, value)])
    assert (judged is not None and judged.score == 0.0) == failed


def test_of_one_authors_corrections_the_last_word_counts():
    run = trajectory(task(1), [say("9")], score=0.0)
    first = correction(run, "3", id="fb_b")
    last = correction(run, "2", id="fb_a", created_at=at(5))
    other = correction(run, "2", author="bob", created_at=at(1))
    assert corrections_of(run, [last, other, first]) == [other, last]


def test_a_changed_mind_on_another_run_of_the_question_takes_the_first_word_back():
    one, again = task(1, reference=None), task(1, reference=None, id="task_again")
    first, second = trajectory(one, [say("?")], score=None), trajectory(again, [say("?")], score=None)
    poems = [correction(first, "Three"), correction(second, "two", created_at=at(5))]
    others = [correction(first, "TWO", "bob"), correction(second, "2", "cleo", created_at=at(9))]
    material = snapshot((one, first), (again, second), said=[*poems, *others])
    taught = {(said.author, said.value) for _, _, said, _ in material.corrections()}
    assert taught == {("ann", "two"), ("bob", "TWO"), ("cleo", "2")}


@pytest.mark.parametrize(("value", "score"), [(True, 1.0), (0.5, 0.5), (2, None), ("1", None), (float("nan"), None)])
def test_a_score_is_a_boolean_or_a_number_between_0_and_1(value, score):
    assert score_of(value) == score


def test_held_out_tasks_are_known_by_id_by_question_and_by_nearly_the_question():
    held = task(7, "Please add the numbers 17 and 25 and give only the sum as your final answer.")
    made = snapshot(held_out_tasks=[held])
    again = held.model_copy(update={"id": "task_again"})
    near = task(8, "Please add the numbers 17 and 25, and give only the sum as your final answer!")
    other = task(9, "Please add the numbers 17 and 26 and give only the sum as your final answer.")
    assert made.held_out_reason(held) == "held out: the task itself"
    assert made.held_out_reason(again) == "held out: the same question"
    assert made.held_out_reason(near) == "held out: nearly the same question"
    assert made.held_out_reason(other) is None


def test_a_stored_task_that_is_held_out_by_fingerprint_also_catches_its_near_duplicates():
    held, near = task(7, "Count the red balls: 3, 4 and 1,000."), task(8, "count the RED balls: 3, 4 and 1000!")
    made = snapshot((held, trajectory(held, solve(7))), held_out=frozenset({held.fingerprint}))
    assert made.held_out_reason(near) == "held out: nearly the same question"


def test_sums_of_other_numbers_or_signs_are_other_tasks():
    made = snapshot(held_out_tasks=[task(1, "3+4")])
    assert made.held_out_reason(task(2, "5+6")) is None
    assert made.held_out_reason(task(3, "3*4")) is None


@settings(deadline=None)
@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_a_long_template_keeps_tasks_apart_by_their_numbers(one, other):
    template = " ".join(f"word{chr(97 + i)}" for i in range(26)) + " compute the sum of 77777 and {}"
    made = snapshot(held_out_tasks=[task(1, template.format(one))])
    reason = made.held_out_reason(task(2, template.format(other)))
    assert (reason is not None) == (one == other)
