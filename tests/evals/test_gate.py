from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.gate import GateConfig, decide, pair_outcomes
from memory.errors import ConfigError
from tests.evals.made import control, evaluation, first, held_out

CALM = control(first(20, 24), first(20, 24))
GAIN = held_out(first(12, 36), first(33, 36))


def test_a_clear_gain_with_calm_controls_is_promoted() -> None:
    decision = decide([GAIN], [CALM, control(first(24, 24), first(23, 24), "tool_validity")])
    assert decision.verdict == "promote"
    assert "12/36 (33%) to 33/36 (92%), +58.3 points" in decision.reasons[0]
    assert [row.state for row in decision.table if row.state != "part"] == ["better", "held", "held"]


def test_an_adapter_that_changes_nothing_is_not_promoted() -> None:
    decision = decide([held_out(first(12, 36), first(12, 36))], [CALM])
    assert decision.verdict == "reject"
    assert "+0.0 points" in decision.reasons[0]


def test_a_worse_candidate_is_rejected() -> None:
    assert decide([held_out(first(20, 36), first(10, 36))], [CALM]).verdict == "reject"


def test_a_gain_on_too_few_tasks_is_not_enough_evidence() -> None:
    decision = decide([held_out(first(1, 12), first(11, 12))], [CALM])
    assert decision.verdict == "not_enough_evidence"
    assert "Only 12 held-out tasks were run and 24 are needed" in decision.reasons[0]


def test_three_wins_in_24_are_not_taken_for_proof() -> None:
    decision = decide([held_out(first(8, 24), first(11, 24))], [CALM])
    assert decision.verdict == "not_enough_evidence"
    assert decision.table[0].state == "unproven"
    assert decision.table[0].p_value == pytest.approx(0.125)


@pytest.mark.parametrize("size", [8, 24, 40])
def test_forgetting_like_the_spikes_chat_is_rejected_at_every_size(size: int) -> None:
    decision = decide([GAIN], [control(first(7 * size // 8, size), first(4 * size // 8, size))])
    assert decision.verdict == "reject"
    assert "more than the 10 points it may lose" in decision.reasons[-1]


def test_two_lost_answers_of_24_are_within_the_margin() -> None:
    assert decide([GAIN], [control(first(20, 24), first(18, 24))]).verdict == "promote"


def test_three_lost_answers_of_24_are_not() -> None:
    assert decide([GAIN], [control(first(20, 24), first(17, 24))]).verdict == "reject"


def test_a_control_in_upheaval_that_ends_within_its_margin_is_not_enough_evidence() -> None:
    before = [True] * 12 + [False] * 12
    after = [False] * 9 + [True] * 3 + [True] * 7 + [False] * 5
    decision = decide([GAIN], [control(before, after)])
    assert decision.verdict == "not_enough_evidence"
    assert "stays plausible" in decision.reasons[-1]


def test_a_control_of_few_tasks_cannot_clear_a_candidate() -> None:
    decision = decide([GAIN], [control(first(7, 8), first(7, 8))])
    assert decision.verdict == "not_enough_evidence"
    assert "8 tasks cannot clear a candidate, 12 are needed" in decision.reasons[-1]


def test_a_control_the_champion_fails_is_blind_and_counts_for_nothing() -> None:
    blind = control(first(0, 24), first(0, 24), "untrained")
    assert decide([GAIN], [CALM, blind]).verdict == "promote"
    alone = decide([GAIN], [blind])
    assert alone.verdict == "not_enough_evidence"
    assert (
        alone.reasons[-1]
        == "Every control suite is one the champion fails itself, so forgetting could not have been seen."
    )


def test_a_part_of_a_control_that_is_lost_for_sure_rejects_whatever_the_rest_gained() -> None:
    kinds = ("refuse", "answer")
    champion = [i % 2 == 1 for i in range(12)]
    pair = tuple(
        evaluation(done, suite="refusals", role="control", generation=n, workloads=kinds)
        for n, done in ((1, champion), (2, [not done for done in champion]))
    )
    decision = decide([GAIN], [CALM, (pair[0], pair[1])])
    assert decision.verdict == "reject"
    (lost,) = [row for row in decision.table if row.state == "lost"]
    assert (lost.suite, lost.workload, lost.champion, lost.candidate) == ("refusals", "answer", 6, 0)
    assert "workload 'answer', went from 6/6" in decision.reasons[-1]


def test_without_controls_nothing_is_promoted_unless_the_operator_says_so() -> None:
    assert decide([GAIN], []).verdict == "not_enough_evidence"
    assert decide([GAIN], [], GateConfig(require_controls=False)).verdict == "promote"


def test_a_suite_may_have_a_margin_of_its_own() -> None:
    lost_two = control(first(20, 24), first(18, 24))
    strict, lax = GateConfig(control_margins={"chat": 0.05}), GateConfig(control_margins={"chat": 0.5})
    assert decide([GAIN], [lost_two], strict).verdict == "reject"
    assert decide([GAIN], [control(first(20, 24), first(12, 24))], lax).verdict == "promote"


def test_a_lost_control_outweighs_missing_evidence_for_the_gain() -> None:
    unproven = held_out(first(8, 24), first(9, 24))
    assert decide([unproven], [control(first(20, 24), first(10, 24))]).verdict == "reject"


def test_a_workload_forgotten_is_not_paid_for_by_another_learned() -> None:
    champion, candidate = [False, True] * 24, [True, False] * 6 + [True, True] * 18
    decision = decide([held_out(champion, candidate)], [CALM])
    assert decision.verdict == "reject"
    (lost,) = [row for row in decision.table if row.state == "lost"]
    assert (lost.role, lost.workload, lost.champion, lost.candidate) == ("held_out", "gcd", 24, 18)
    assert [row.workload for row in decision.table if row.role == "held_out"] == [None, "gcd", "sums"]
    assert "workload 'gcd', went from 24/24 (100%) to 18/24" in " ".join(decision.reasons)


def test_a_workload_whose_fall_is_not_proven_is_named_beside_a_gain_overall() -> None:
    champion, candidate = [False, True] * 24, [True, False] * 4 + [True, True] * 20
    decision = decide([held_out(champion, candidate)], [CALM])
    assert decision.verdict == "promote"
    assert decision.reasons[1].startswith("Warning: on held-out workload 'gcd' success fell from 24/24 to 20/24")


def test_a_workload_that_fell_far_without_proof_wants_more_tasks_first() -> None:
    """Eight lost and two won of sixteen: by the exact test that may be chance (p = 0.055)."""
    champion = [False, True] * 8 + [False, False] * 8
    candidate = [True, False] * 8 + [True, True] * 2 + [True, False] * 6
    decision = decide([held_out(champion, candidate)], [CALM])
    assert decision.verdict == "not_enough_evidence"
    (fell,) = [row for row in decision.table if row.state == "unclear"]
    assert (fell.workload, fell.champion, fell.candidate) == ("gcd", 8, 2)
    assert "workload 'gcd', went from 8/16 (50%) to 2/16" in " ".join(decision.reasons)
    assert "too much to be let pass" in decision.reasons[-1]


def test_a_workload_of_few_tasks_holds_nothing_up_without_proof() -> None:
    champion, candidate = [False, True] * 2 + [False] * 40, [True, False] * 2 + [True] * 40
    tasks = ("sums", "gcd", "sums", "gcd", *["sums"] * 40)
    pair = [evaluation(found, generation=g, workloads=tasks) for g, found in ((1, champion), (2, candidate))]
    decision = decide([(pair[0], pair[1])], [CALM])
    assert decision.verdict == "promote"
    assert "'gcd' success fell from 2/2 to 0/2" in decision.reasons[1]


def test_a_proven_fall_within_the_margin_of_its_suite_is_told_and_does_not_decide() -> None:
    champion, candidate = [False, True] * 24, [True, False] * 6 + [True, True] * 18
    lax = GateConfig(control_margins={"held": 0.3})
    assert decide([held_out(champion, candidate)], [CALM], lax).verdict == "promote"


def test_no_held_out_tasks_are_not_enough_evidence() -> None:
    assert decide([], [CALM]).verdict == "not_enough_evidence"
    assert decide([held_out([], [])], [CALM]).verdict == "not_enough_evidence"


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"suite_hash": "other"}, "suite hash differs"),
        ({"settings": {"max_turns": 9}}, "settings differs"),
        ({"memory": True}, "memory differs"),
        ({"suite": "another"}, "suite differs"),
        ({"role": "control"}, "role differs"),
    ],
)
def test_evaluations_that_are_not_alike_are_refused(other: dict[str, Any], told: str) -> None:
    champion = evaluation(first(12, 36))
    fields: dict[str, Any] = {"suite_hash": champion.suite_hash, **other}
    with pytest.raises(ConfigError, match=told):
        decide([(champion, evaluation(first(30, 36), generation=1, **fields))], [CALM])


def test_evaluations_of_different_tasks_are_refused() -> None:
    with pytest.raises(ConfigError, match="1 task keys are in one only"):
        decide([(evaluation(first(3, 36)), evaluation(first(3, 35)))], [CALM])


def test_what_could_not_be_judged_for_one_counts_for_neither_and_is_told() -> None:
    champion, candidate = GAIN
    left = champion.model_copy(update={"outcomes": champion.outcomes[1:], "unjudged": ["held/0"]})
    right = candidate.model_copy(update={"outcomes": candidate.outcomes[:-1], "unjudged": ["held/35"]})
    decision = decide([(left, right)], [CALM])
    assert decision.verdict == "promote"
    assert (decision.table[0].n, decision.table[0].champion, decision.table[0].candidate) == (34, 11, 32)
    assert decision.reasons[1].startswith("Warning: verifiers failed at 2 of the tasks of 'held'")
    assert "held/0, held/35" in decision.reasons[1]


def test_evaluations_that_saw_different_memories_are_refused() -> None:
    one = evaluation(first(3, 36), memory=True, memory_watermark="7")
    two = evaluation(first(9, 36), memory=True, memory_watermark="8")
    with pytest.raises(ConfigError, match="memory watermark differs"):
        decide([(one, two)], [CALM])
    assert len(pair_outcomes(one, two, same_settings=False)) == 36


def test_a_suite_in_the_wrong_role_is_refused() -> None:
    with pytest.raises(ConfigError, match="it was given as control"):
        decide([GAIN], [GAIN])


def test_outcomes_are_paired_by_key_whatever_their_order() -> None:
    champion, candidate = GAIN
    shuffled = candidate.model_copy(update={"outcomes": candidate.outcomes[::-1]})
    assert decide([(champion, shuffled)], [CALM]) == decide([GAIN], [CALM])


outcomes = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=24, max_size=48)


@settings(deadline=None, max_examples=25)
@given(outcomes, outcomes)
def test_what_is_promoted_is_better_and_lost_no_more_than_its_margin(
    held: list[tuple[bool, bool]], kept: list[tuple[bool, bool]]
) -> None:
    decision = decide(
        [held_out([a for a, _ in held], [b for _, b in held])], [control([a for a, _ in kept], [b for _, b in kept])]
    )
    net = sum(b - a for a, b in kept) / len(kept)
    if decision.verdict == "promote":
        assert sum(b - a for a, b in held) > 0
        assert net >= -0.1
    if net < -0.1:
        assert decision.verdict == "reject"
    assert all(row.low <= row.points <= row.high for row in decision.table)
