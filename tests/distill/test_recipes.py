"""The recipes: what each one makes of a snapshot."""

from __future__ import annotations

import pytest

from distill.recipes import RECIPES, load
from distill.recipes.contrast import contrast
from distill.recipes.corrections import corrections
from distill.recipes.successes import PER_TASK, successes
from memory.errors import ConfigError
from memory.records import MALFORMED, RECALLED, ExampleKind, FeedbackKind, StopReason, Trust, VerifierSpec
from tests.distill.samples import (
    TOOLS,
    call,
    corrected,
    correction,
    feedback,
    result,
    say,
    snapshot,
    solve,
    task,
    trajectory,
)

ONE = task(1)


def test_recipes_are_found_by_name_and_an_unknown_one_lists_the_known():
    assert list(load(["successes", "contrast"])) == ["successes", "contrast"]
    with pytest.raises(ConfigError, match=r"unknown recipe 'magic'; known: contrast, .*corrections, .*successes"):
        load(["magic"])


@pytest.mark.parametrize("name", ["contrast", "corrections", "intervene", "successes"])
def test_recipes_emit_neither_recalled_messages_nor_a_system_prompt(name):
    shown = [{"role": "user", "content": "What is 5 + 1?"}, *solve(5)]
    good = trajectory(ONE, solve(1), recalled=shown)
    bad = trajectory(ONE, [say("7")], 0.0, recalled=shown, id="traj_bad")
    made = snapshot((ONE, good), (ONE, bad), said=[correction(bad, solve(1))])
    examples = list(RECIPES[name](made))
    assert examples
    for example in examples:
        messages = example.messages + (example.chosen or []) + (example.rejected or [])
        assert all(m["role"] != "system" and m.get("name") != RECALLED for m in messages)
        assert example.messages[: len(ONE.messages)] == ONE.messages
        assert example.tools == TOOLS


def test_successes_are_own_runs_with_full_marks():
    two, three = task(2), task(3)
    made = snapshot(
        (ONE, trajectory(ONE, solve(1))),
        (two, trajectory(two, [say("9")], score=0.5)),
        (three, trajectory(three, solve(3), score=None)),
    )
    (example,) = successes(made)
    assert (example.task_id, example.kind, example.messages) == (ONE.id, ExampleKind.SFT, ONE.messages + solve(1))
    assert example.sources == [f"traj_{ONE.id}"]


def test_a_success_by_users_names_their_feedback_as_sources():
    run = trajectory(ONE, solve(1), score=None)
    up = feedback(run, FeedbackKind.SCORE, 1.0, "operator:mia", trust=Trust.TRUSTED)
    (example,) = successes(snapshot((ONE, run), said=[up]))
    assert example.sources == [run.id, up.id]


@pytest.mark.parametrize(
    ("authors", "answers", "taught"),
    [
        (["ann"], ["2"], False),
        (["ann", "ann"], ["2", "2"], False),
        (["ann", "anonymous"], ["2", "2"], False),
        (["key:shop/ann", "key:shop/bob"], ["2", "2"], False),
        (["ann", "bob"], ["2", "3"], False),
        (["ann", "bob"], ["2", " 2"], True),
        (["operator"], ["2"], True),
    ],
)
def test_what_one_user_praises_is_not_taught_until_somebody_else_praises_it_too(authors, answers, taught):
    runs = [trajectory(ONE, [say(answer)], score=None, id=f"traj_{n}") for n, answer in enumerate(answers)]
    ups = [
        feedback(run, FeedbackKind.SCORE, 1.0, author, trust=Trust.TRUSTED)
        for run, author in zip(runs, authors, strict=True)
    ]
    assert bool(list(successes(snapshot(*[(ONE, run) for run in runs], said=ups)))) == taught


def test_equal_successes_of_a_question_count_once_and_runs_that_show_their_work_come_first():
    again = ONE.model_copy(update={"id": "task_again"})
    lucky = trajectory(ONE, [say("2")], id="traj_a")
    long = trajectory(ONE, [call("1"), result("1"), *solve(1, "c2")], id="traj_b")
    short = trajectory(again, solve(1, "x"), id="traj_c")
    same = trajectory(ONE, solve(1, "y"), id="traj_d")
    made = list(successes(snapshot((ONE, lucky), (ONE, long), (again, short), (ONE, same))))
    assert [e.sources for e in made] == [["traj_c"], ["traj_b"], ["traj_a"]]


def test_a_question_keeps_only_so_many_successes():
    runs = [trajectory(ONE, [call(f"1 + 1 + {n} * 0"), result("2"), say("2")], id=f"traj_{n}") for n in range(9)]
    assert len(list(successes(snapshot(*[(ONE, run) for run in runs])))) == PER_TASK


def test_a_run_that_was_not_ended_by_an_answer_is_no_success():
    run = trajectory(ONE, solve(1), stop_reason=StopReason.MAX_TURNS)
    assert not list(successes(snapshot((ONE, run))))


def test_a_verifier_that_does_not_look_at_the_answer_makes_no_success():
    blind = task(1, verifier=VerifierSpec(name="action"))
    assert not list(successes(snapshot((blind, trajectory(blind, [call("9 * 9"), result("81"), say("81")])))))


def test_corrections_are_whole_corrected_runs_and_equal_ones_count_once():
    run = trajectory(ONE, [say("9")], 0.0)
    said = [correction(run, solve(1)), correction(run, solve(1, "z"), "bob"), correction(run, "2", "cleo")]
    made = list(corrections(snapshot((ONE, run), said=said)))
    assert [e.messages for e in made] == [ONE.messages + solve(1), [*ONE.messages, say("2")]]
    assert made[0].sources == [run.id, said[0].id]


def test_untrusted_corrections_make_no_example():
    run = trajectory(ONE, [say("9")], 0.0)
    assert not list(corrections(snapshot((ONE, run), said=[correction(run, "2", trust=Trust.QUARANTINED)])))


def test_a_pair_stands_at_the_first_step_where_the_runs_part():
    good = trajectory(ONE, [call("1 + 1"), result("2"), say("2")])
    bad = trajectory(ONE, [call("1  + 1", "k"), result("2", "k"), say("11")], 0.0, id="traj_bad")
    (pair,) = contrast(snapshot((ONE, good), (ONE, bad)))
    assert pair.kind is ExampleKind.DPO
    assert pair.messages == [*ONE.messages, call("1 + 1"), result("2")]
    assert (pair.chosen, pair.rejected) == ([say("2")], [say("11")])
    assert pair.sources == ["traj_bad", f"traj_{ONE.id}"]


def test_a_failed_runs_own_correction_goes_before_anothers_success():
    other = trajectory(ONE, [call("2 * 1"), result("2"), say("2")], id="traj_other")
    bad = trajectory(ONE, [say("7")], 0.0, id="traj_bad")
    (pair,) = contrast(snapshot((ONE, other), (ONE, bad), said=[correction(bad, solve(1))]))
    assert pair.chosen == solve(1)[:1]


def test_each_failed_run_is_paired_with_its_own_correction():
    runs = [trajectory(ONE, [say("7")], 0.0, id=f"traj_{n}") for n in range(2)]
    fixes = [[call(f"1 + 1 + {n}"), result("2"), say("2")] for n in range(2)]
    said = [correction(run, fix) for run, fix in zip(runs, fixes, strict=True)]
    pairs = list(contrast(snapshot(*[(ONE, run) for run in runs], said=said)))
    assert [pair.chosen for pair in pairs] == [fix[:1] for fix in fixes]


def test_of_several_failures_at_one_step_the_one_near_two_sigmas_below_the_mean_is_rejected():
    scores = {"worst": 0.0, "sweet": 0.4, "nearly": 0.6}
    failed = [trajectory(ONE, [say(name)], score, id=f"traj_{name}") for name, score in scores.items()]
    elsewhere = trajectory(ONE, [call("1  + 1", "k"), result("2", "k"), say("11")], 0.0, id="traj_elsewhere")
    good = [trajectory(ONE, solve(1), id=f"traj_good{n}") for n in range(24)]
    pairs = list(contrast(snapshot(*[(ONE, run) for run in [*failed, elsewhere, *good]])))
    rejected = {pair.rejected[0]["content"]: pair for pair in pairs if pair.rejected}
    assert set(rejected) == {"sweet", "11"}, "another step is another lesson"
    assert rejected["sweet"].chosen == solve(1)[:1]


@pytest.mark.parametrize(
    "attempt",
    [
        pytest.param(solve(1), id="the same run"),
        pytest.param(solve(1)[:2], id="only its beginning"),
        pytest.param([call("1 + 1"), result("error: busy"), say("7")], id="another observation"),
        pytest.param([], id="nothing done"),
    ],
)
def test_runs_that_do_not_part_at_a_turn_of_the_agent_make_no_pair(attempt):
    good = trajectory(ONE, solve(1))
    bad = trajectory(ONE, attempt, 0.0, id="traj_bad")
    assert not list(contrast(snapshot((ONE, good), (ONE, bad))))


def test_two_failures_or_two_successes_are_ties_and_make_no_pair():
    for score in (0.0, 1.0):
        runs = [trajectory(ONE, [say(str(n))], score, id=f"traj_{n}") for n in range(2)]
        assert not list(contrast(snapshot(*[(ONE, run) for run in runs])))


def test_a_bare_right_answer_does_not_reject_a_tool_call():
    bad = trajectory(ONE, [call("1 + 2"), result("3"), say("3")], 0.0)
    assert not list(contrast(snapshot((ONE, bad), said=[correction(bad, "2")])))


def test_an_unreadable_turn_is_rejected_for_the_right_one():
    bad = trajectory(ONE, [say("hmm", name=MALFORMED)], 0.0, stop_reason=StopReason.MALFORMED)
    (pair,) = contrast(snapshot((ONE, bad), said=[correction(bad, solve(1))]))
    assert pair.rejected == [say("hmm", name=MALFORMED)]


def test_a_run_that_ended_by_an_error_makes_no_pair():
    bad = trajectory(ONE, [say("7")], 0.0, stop_reason=StopReason.ERROR)
    assert not list(contrast(snapshot((ONE, bad), said=[correction(bad, solve(1))])))


def test_recipes_give_the_same_examples_whatever_order_the_records_came_in():
    made = corrected(range(6))
    turned = snapshot(*[(made.tasks[t.task_id], t) for t in reversed(made.trajectories)], said=made.feedback[::-1])
    for recipe in RECIPES.values():
        forward, backward = ([e.model_dump(exclude={"id"}) for e in recipe(material)] for material in (made, turned))
        assert forward == backward
