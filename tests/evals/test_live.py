"""What live outcomes may undo a promotion, and what they may not."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from itertools import count

import pytest
from pydantic import ValidationError

from evals.live import LiveVerdict, WatchConfig, judge
from memory.outcomes import LiveRun, LiveScore

SINCE = datetime(2026, 1, 2, tzinfo=UTC)
BEFORE, AFTER = SINCE - timedelta(hours=1), SINCE + timedelta(hours=1)
numbers = count()


def runs(
    generation: int,
    n: int,
    good: int,
    *,
    workload: str = "sums",
    tenant: str = "default",
    asked: str | None = None,
    verified: bool = True,
    at: datetime | None = None,
) -> list[LiveRun]:
    """`n` judged runs of distinct tasks, `good` of them with full marks."""
    return [
        LiveRun(
            id=f"traj_{next(numbers)}",
            generation=generation,
            tenant=tenant,
            workload=workload,
            fingerprint=asked or f"task {next(numbers)}",
            started_at=at or (AFTER if generation == 2 else BEFORE),
            verified=i < good if verified else None,
        )
        for i in range(n)
    ]


def scored(of: list[LiveRun], success: bool, voice: str = "key:one", operator: bool = False) -> list[LiveScore]:
    return [LiveScore(run, voice, operator, success) for run in of]


def verdict(judged: list[LiveRun], scores: list[LiveScore] | None = None, **settings: int) -> LiveVerdict:
    return judge(judged, scores or [], old=1, new=2, since=SINCE, config=WatchConfig.model_validate(settings))


def test_a_generation_that_verifiers_find_worse_is_worse_and_the_evidence_says_by_how_much() -> None:
    found = verdict(runs(1, 100, 90) + runs(2, 30, 10))
    assert found.worse
    assert found.evidence["workload"] == "sums"
    assert found.evidence["old"] == {"n": 100, "successes": 90}
    assert found.evidence["new"] == {"n": 30, "successes": 10}
    assert found.evidence["confidence"] == 0.95
    assert found.evidence["evidence"] > 20
    assert "90/100 (90%) before, 10/30 (33%) now" in found.told


def test_a_generation_that_is_as_good_or_better_stays() -> None:
    assert not verdict(runs(1, 100, 60) + runs(2, 100, 58)).worse
    assert not verdict(runs(1, 100, 30) + runs(2, 100, 90)).worse


def test_few_outcomes_decide_nothing() -> None:
    assert not verdict(runs(1, 100, 100) + runs(2, 19, 0)).worse
    assert not verdict(runs(1, 19, 19) + runs(2, 100, 0)).worse
    assert verdict(runs(1, 100, 100) + runs(2, 20, 0)).worse


def test_harder_work_under_the_new_generation_is_no_fault_of_it() -> None:
    easy_before = runs(1, 90, 90) + runs(1, 30, 0, workload="riddles")
    hard_after = runs(2, 30, 30) + runs(2, 90, 0, workload="riddles")
    assert not verdict(easy_before + hard_after).worse


def test_one_workload_that_fell_is_found_among_many_that_did_not() -> None:
    steady = [r for i in range(5) for g in (1, 2) for r in runs(g, 60, 40, workload=f"steady {i}")]
    assert verdict(steady + runs(1, 100, 90) + runs(2, 40, 10)).worse
    assert not verdict(steady).worse


def test_the_more_workloads_are_compared_the_more_one_must_show() -> None:
    tipped = runs(1, 100, 80) + runs(2, 20, 6)
    assert verdict(tipped).worse
    steady = [r for i in range(9) for g in (1, 2) for r in runs(g, 60, 40, workload=f"steady {i}")]
    assert not verdict(steady + tipped).worse


def test_the_same_question_again_and_again_is_one_outcome() -> None:
    assert not verdict(runs(1, 100, 90) + runs(2, 100, 0, asked="the same")).worse


def test_runs_from_before_the_promotion_do_not_count_against_it() -> None:
    assert not verdict(runs(1, 100, 90) + runs(2, 60, 0, at=BEFORE)).worse


def test_a_standing_that_was_settled_long_ago_is_not_upset_by_what_the_work_has_become() -> None:
    judged = runs(1, 100, 80) + runs(2, 60, 50) + runs(2, 60, 0)
    assert verdict(judged).worse
    assert not verdict(judged, max_outcomes=60).worse


def test_one_authors_scores_never_roll_back_and_several_authors_do() -> None:
    old, new = runs(1, 100, 0, verified=False), runs(2, 60, 0, verified=False)
    liked = scored(old, success=True, voice="operator", operator=True)
    assert not verdict([], liked + scored(new, success=False)).worse
    many = [s for i in range(6) for s in scored(new[i * 10 : i * 10 + 10], success=False, voice=f"key:{i}")]
    assert verdict([], liked + many).worse
    assert verdict([], liked + scored(new, success=False, voice="operator", operator=True)).worse


def test_the_cap_of_an_author_may_not_reach_what_a_verdict_needs() -> None:
    with pytest.raises(ValidationError, match="one author could roll back alone"):
        WatchConfig(min_outcomes=10)


def test_a_verifiers_word_holds_before_a_users() -> None:
    new = runs(2, 60, 55)
    words = [s for i in range(6) for s in scored(new[i * 10 : i * 10 + 10], success=False, voice=f"key:{i}")]
    assert not verdict(runs(1, 100, 90) + new, words).worse


def test_of_several_words_on_a_run_the_operators_holds_else_the_last() -> None:
    old, new = runs(1, 100, 95), runs(2, 40, 0, verified=False)
    hostile = [s for i, run in enumerate(new) for s in scored([run], success=False, voice=f"key:{i}")]
    operator = scored(new, success=True, voice="operator", operator=True)
    assert not verdict(old, operator + hostile).worse
    friendly = [s for i, run in enumerate(new) for s in scored([run], success=True, voice=f"key:{i}")]
    assert not verdict(old, hostile + friendly).worse
    assert verdict(old, friendly + hostile).worse


def test_one_tenant_alone_does_not_roll_back_what_serves_others_well() -> None:
    hostile = runs(1, 50, 50, tenant="hostile") + runs(2, 50, 0, tenant="hostile")
    assert verdict(hostile).worse  # nobody else is served
    content = runs(1, 60, 50, tenant="content") + runs(2, 60, 50, tenant="content")
    alone = verdict(hostile + content)
    assert not alone.worse
    assert "only in what one tenant asks" in alone.told
    suffering = runs(1, 60, 55, tenant="other") + runs(2, 30, 12, tenant="other")
    assert verdict(hostile + suffering).worse


def test_a_tenant_with_too_little_to_compare_neither_vouches_nor_objects() -> None:
    fallen = runs(1, 500, 450, tenant="a") + runs(2, 200, 20, tenant="a")
    once = runs(1, 1, 1, tenant="b") + runs(2, 1, 1, tenant="b")
    assert verdict(fallen + once).worse


def test_each_workload_of_the_others_is_judged_by_itself() -> None:
    suspect = runs(1, 50, 50, tenant="a") + runs(2, 50, 0, tenant="a")
    # Pooled, the others would have fallen from 92% to 58%; none of their workloads has.
    easy = runs(1, 90, 90, tenant="b") + runs(2, 40, 40, tenant="b")
    hard = runs(1, 30, 6, tenant="b", workload="riddles") + runs(2, 60, 12, tenant="b", workload="riddles")
    assert not verdict(suspect + easy + hard).worse
    # Pooled, they would have risen; one has fallen.
    fell = runs(1, 30, 28, tenant="c") + runs(2, 30, 12, tenant="c")
    rest = runs(1, 30, 0, tenant="c", workload="chat") + runs(2, 90, 80, tenant="c", workload="chat")
    assert verdict(suspect + fell + rest).worse


def test_many_workloads_of_the_others_in_which_nothing_fell_do_not_vouch_by_chance() -> None:
    suspect = runs(1, 50, 50, tenant="a") + runs(2, 50, 0, tenant="a")
    # One in ten looks worse, as chance will have it.
    steady = [r for i in range(9) for g in (1, 2) for r in runs(g, 40, 30, tenant="b", workload=f"steady {i}")]
    unlucky = runs(1, 40, 32, tenant="b", workload="unlucky") + runs(2, 40, 21, tenant="b", workload="unlucky")
    assert not verdict(suspect + steady + unlucky).worse
