"""Hints: which ones a try may see, and that what is learned from it is learned without them."""

from __future__ import annotations

import pytest

from agent.prompts import compose
from distill.dataset import DatasetConfig, build
from distill.hints import Hinted, hints_of
from distill.principles import past_runs
from distill.recipes.contrast import contrast
from distill.recipes.successes import successes
from memory.recall import NoMemory
from memory.records import Feedback, FeedbackKind, Purpose, Task, Trajectory, Trust
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


def hinted(number: int, *hints: Feedback, withheld: bool = False) -> tuple[Task, Trajectory]:
    """A try that went well with these hints before its eyes."""
    one = task(number)
    shown = [item for item in Hinted(NoMemory(), {(one.tenant, one.fingerprint): list(hints)}).recall(one).items]
    shown = [item.model_copy(update={"withheld": withheld}) for item in shown]
    tried = trajectory(one, solve(number), id=f"traj_try_{number}", purpose=Purpose.PRACTICE)
    return one, tried.model_copy(update={"recalled": shown})


@pytest.mark.parametrize("withheld", [False, True])
def test_what_a_hint_helped_to_teach_names_the_hint_among_its_sources(withheld: bool):
    said = hint("Use the calculator.")
    one, tried = hinted(1, said, withheld=withheld)
    failed = trajectory(one, [*solve(7)[:2], say("8")], score=0.0, id="traj_failed")
    sources = [tried.id] if withheld else [tried.id, said.id]
    material = snapshot((one, tried), (one, failed), said=[said])
    (example,) = successes(material)
    assert example.sources == sources
    (pair,) = contrast(material)
    assert pair.sources == sorted([failed.id, *sources])
    (kept,) = past_runs(material)
    assert kept.sources == sorted(sources)


def test_what_a_hint_helped_to_teach_counts_for_its_author_and_for_who_asked():
    hints = {n: hint("Use the calculator.", id=f"fb_{n}", author="eve") for n in range(20)}
    pairs = [hinted(n, said) for n, said in hints.items()]
    config = DatasetConfig(min_examples=1, max_per_author=5, max_per_cluster=1000)

    def count(tried: list[tuple[Task, Trajectory]]) -> int:
        material = snapshot(*tried, said=list(hints.values()))
        return build(material, ["successes"], NoMemory(), compose, config).counts["successes"]

    assert count(pairs) == 5
    by_bob = [(one.model_copy(update={"user": "bob"}), tried) for one, tried in pairs[:4]]
    unhinted = [(task(n, user="bob"), trajectory(task(n), solve(n))) for n in range(30, 40)]
    assert count([*by_bob, *unhinted]) == 5, "the reference that judged a hinted try is still the asker's"


def test_a_try_that_was_shown_a_hint_which_was_rejected_since_teaches_nothing():
    one, tried = hinted(1, hint("Use the calculator."))
    assert list(successes(snapshot((one, tried), said=[hint("Use the calculator.")])))
    assert not list(successes(snapshot((one, tried), said=[hint("Use the calculator.", trust=Trust.REJECTED)])))


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
