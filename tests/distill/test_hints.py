"""Hints: which ones a try may see, and that what is learned from it is learned without them."""

from __future__ import annotations

from agent.prompts import compose
from distill.dataset import DatasetConfig, build
from distill.hints import Hinted, hints_of
from memory.records import FeedbackKind, Purpose, Trust
from tests.distill.samples import OneRun, feedback, say, snapshot, solve, task, trajectory

ONE, TWO = task(1), task(2)
FAILED = trajectory(ONE, [say("7")], 0.0)


def hint(text: str, **fields):
    return feedback(FAILED, FeedbackKind.HINT, text, **{"trust": Trust.TRUSTED, **fields})


def test_a_trusted_hint_on_a_question_that_nobody_solved_is_shown_before_what_memory_recalls():
    said = hint("Use the calculator\nfor every step.")
    hints = hints_of(snapshot((ONE, FAILED), said=[said]))
    memory = Hinted(OneRun(), hints)
    recall = memory.recall(ONE)
    assert [p.text for p in recall.principles] == ["Use the calculator for every step."]
    assert [item.id for item in recall.items] == [said.id, "run_900"]
    assert "Use the calculator for every step." in str(compose(ONE, ["calculator"], recall))
    assert not memory.recall(TWO).principles


def test_doubtful_hints_answers_in_disguise_and_solved_questions_are_left_out():
    doubtful = hint("Use the calculator.", trust=Trust.QUARANTINED)
    assert not hints_of(snapshot((ONE, FAILED), said=[doubtful]))
    assert not hints_of(snapshot((ONE, FAILED), said=[hint("It is 2, of course.")]))
    solved = trajectory(ONE, solve(1), id="traj_good")
    assert not hints_of(snapshot((ONE, FAILED), (ONE, solved), said=[hint("Use the calculator.")]))


def test_what_a_hinted_try_did_right_is_taught_without_the_hint():
    said = hint("Use the calculator for every step.")
    memory = Hinted(OneRun(), hints_of(snapshot((ONE, FAILED), said=[said])))
    shown = memory.recall(ONE)
    tried = trajectory(ONE, solve(1), id="traj_try", purpose=Purpose.PRACTICE).model_copy(
        update={"messages": [*compose(ONE, ["calculator"], shown), *solve(1)], "recalled": shown.items}
    )
    made = snapshot((ONE, FAILED), (ONE, tried), said=[said])
    rows = build(made, ["successes", "internalise"], OneRun(), compose, DatasetConfig(min_examples=1)).examples
    assert {row.messages[-1]["content"] for row in rows} == {"2"}
    assert not any("for every step" in str(row.messages) for row in rows)
    assert any(not row.with_memory for row in rows)
