"""Runs: read from trajectories and corrections, checked, compared."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.runs import actions_of, corrected_run, flaw_of, run_of
from memory.records import MALFORMED, RECALLED
from tests.distill.samples import SYSTEM, TOOLS, call, result, say, solve, task, trajectory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
FIELDS = st.sampled_from(["role", "content", "tool_calls", "tool_call_id", "name"])
ROLES = st.sampled_from(["assistant", "tool", "user", "system"])


def test_a_run_leaves_out_the_system_prompt_and_what_memory_showed():
    one = task(1)
    shown = [{"role": "user", "content": "What is 5 + 1?"}, *solve(5)]
    assert run_of(trajectory(one, solve(1), recalled=shown), one) == solve(1)


def test_an_unreadable_turn_and_its_reminder_are_cut_from_a_run():
    one = task(1)
    stumbled = [say("hmm", name=MALFORMED), {"role": "user", "content": "Reply with one action."}, *solve(1)]
    assert run_of(trajectory(one, stumbled), one) == solve(1)


def test_a_trajectory_of_another_conversation_has_no_run():
    assert run_of(trajectory(task(1), solve(1)), task(2)) is None


def test_a_string_is_the_final_answer():
    assert corrected_run("2", task(1), TOOLS) == [say("2")]


def test_a_whole_edited_conversation_is_taken_down_to_its_run():
    one = task(1)
    shown = [{"role": "user", "content": "What is 5 + 1?", "name": RECALLED}]
    assert corrected_run([SYSTEM, *shown, *one.messages, *solve(1)], one, TOOLS) == solve(1)


def test_calls_without_ids_are_paired_with_their_results_in_order():
    bare = {
        "role": "assistant",
        "tool_calls": [{"function": {"name": "calculator", "arguments": {"expression": "1+1"}}}],
    }
    run = corrected_run([bare, {"role": "tool", "content": "2"}, say("2")], task(1), TOOLS)
    assert run[0]["tool_calls"][0]["id"] == run[1]["tool_call_id"] == "call00001"
    assert run[0]["tool_calls"][0]["function"]["arguments"] == '{"expression": "1+1"}'


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("  ", "empty"),
        ([], "an answer or a list"),
        (3, "an answer or a list"),
        (["2"], "must be objects"),
        ([{"role": "user", "content": "more"}, say("2")], "assistant and tool messages only"),
        ([call("1+1"), say("2")], "left without its result"),
        ([result("2"), say("2")], "answers no open tool call"),
        ([call("1+1"), result("2")], "not the assistant's answer"),
        ([say(""), say("2")], "empty"),
        ("half a pair \ud800", "no JSON text"),
        ([{"role": "assistant", "content": 2}], "must be text"),
        ([say("Visit evil.example"), say("2")], "nothing may follow"),
        ([say("Let me see."), *solve(1)], "nothing may follow"),
        ([{"role": "assistant", "tool_calls": [{"function": {"name": "rm", "arguments": "{}"}}]}], "offer the tool"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": "calculator", "arguments": "1"}}]}],
            "JSON object",
        ),
        ([{"role": "assistant", "tool_calls": "calculator"}], "must be a list"),
    ],
)
def test_a_correction_that_is_no_whole_run_is_refused_with_the_reason(value, reason):
    with pytest.raises(ValueError, match=reason):
        corrected_run(value, task(1), TOOLS)


def test_a_corrected_call_is_taken_as_it_is_served_without_words_beside_it():
    assert corrected_run([call("1+1") | {"content": "Let me see."}, result("2"), say("2")], task(1), TOOLS) == [
        call("1+1"),
        result("2"),
        say("2"),
    ]


def test_calls_made_side_by_side_become_turns_of_their_own_each_with_its_result():
    both = {**call("1+1", "a"), "tool_calls": [call("1+1", "a")["tool_calls"][0], call("2+2", "b")["tool_calls"][0]]}
    run = corrected_run([both, result("4", "b"), result("2", "a"), say("2")], task(1), TOOLS)
    assert run == [call("1+1", "a"), result("2", "a"), call("2+2", "b"), result("4", "b"), say("2")]


@settings(deadline=None)
@given(st.one_of(JSON, st.lists(st.dictionaries(FIELDS, ROLES | JSON, max_size=5), max_size=5)))
def test_whatever_a_user_sends_is_a_whole_run_or_refused(value):
    try:
        run = corrected_run(value, task(1), TOOLS)
    except ValueError:
        return
    assert flaw_of(run, TOOLS) is None


def test_white_space_and_call_ids_do_not_make_two_runs_different():
    spaced = [call("1  +  1", "other"), result("2", "other"), say(" 2\n")]
    assert actions_of(spaced) == actions_of([call("1 + 1"), result("2"), say("2")])
    assert actions_of(spaced) != actions_of([call("1 + 2"), result("3"), say("3")])
