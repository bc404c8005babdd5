"""Replay: how many earlier examples come again, of which workload."""

from __future__ import annotations

from collections import Counter

import pytest

from distill.replay import replay, replay_shares, retention
from memory.night_records import Evaluation, TaskOutcome
from memory.records import Example, ExampleKind


def earlier(**counts: int) -> list[Example]:
    return [
        Example(
            recipe="successes",
            kind=ExampleKind.SFT,
            workload=workload,
            task_id=f"task_{n}",
            messages=[{"role": "user", "content": f"{workload} {n}"}, {"role": "assistant", "content": str(n)}],
        )
        for workload, count in counts.items()
        for n in range(count)
    ]


def of(picked: list[Example]) -> Counter[str]:
    return Counter(e.workload for e in picked)


def test_one_share_takes_the_workloads_in_turn():
    assert of(replay(earlier(sums=50, words=50), new=40, share=0.25, seed=0)) == {"sums": 5, "words": 5}


def test_equal_shares_come_to_the_same_examples_as_one():
    material = earlier(sums=50, words=50)
    one = replay(material, new=40, share=0.25, seed=3)
    assert replay(material, new=40, share=0.25, seed=3, shares={"sums": 0.25, "words": 0.25}) == one
    assert replay(material, new=40, share=0.25, seed=3, shares={}) == one


def test_a_workload_that_lost_success_is_replayed_more_and_the_others_as_before():
    shares = replay_shares(0.25, {"sums": 0.9, "words": 0.8}, {"sums": 0.7, "words": 0.85})
    assert shares == pytest.approx({"sums": 0.5, "words": 0.25})
    assert of(replay(earlier(sums=50, words=50), new=40, share=0.25, seed=0, shares=shares)) == {"sums": 10, "words": 5}


def test_the_share_is_raised_up_to_a_limit_and_only_by_what_is_there():
    shares = replay_shares(0.25, {"sums": 1.0}, {"sums": 0.0})
    assert shares == pytest.approx({"sums": 0.75})
    assert of(replay(earlier(sums=50, words=50), new=40, share=0.25, seed=0, shares=shares)) == {"sums": 15, "words": 5}
    assert of(replay(earlier(sums=7, words=50), new=40, share=0.25, seed=0, shares=shares)) == {"sums": 7, "words": 13}
    assert of(replay(earlier(sums=7, words=6), new=40, share=0.25, seed=0, shares=shares)) == {"sums": 7, "words": 6}


def test_many_workloads_and_few_new_examples_are_replayed_by_retention_as_by_a_fixed_share():
    material = earlier(**{f"kind_{n:02d}": 5 for n in range(12)})
    fixed = replay(material, new=10, share=0.5, seed=0)
    assert len(fixed) == 5
    assert replay(material, new=10, share=0.5, seed=0, shares={}) == fixed
    lost = replay(material, new=10, share=0.5, seed=0, shares={"kind_11": 1.5})
    assert len(lost) == 6
    assert of(lost)["kind_11"] == 2


def test_ten_generations_replay_many_examples_and_one_generation_always_the_same():
    material = earlier(sums=20, words=20)
    nights = [replay(material, new=8, share=0.5, seed=0, champion=number) for number in range(1, 11)]
    assert {len(night) for night in nights} == {4}
    assert len({example.id for night in nights for example in night}) > 20
    assert replay(material, new=8, share=0.5, seed=0, champion=3) == nights[2]


def test_a_workload_measured_only_once_keeps_the_share():
    assert replay_shares(0.2, {"sums": 1.0}, {"words": 0.1}) == {"sums": 0.2, "words": 0.2}


def test_what_is_replayed_does_not_depend_on_the_order_it_came_in():
    material, shares = earlier(sums=20, words=20), {"sums": 0.5}
    forward, backward = (
        replay(given, new=20, share=0.25, seed=1, shares=shares) for given in (material, material[::-1])
    )
    assert forward == backward


def measured(generation: int, suite: str = "held_out", suite_hash: str = "h", **successes: float) -> Evaluation:
    outcomes = [
        TaskOutcome(key=f"{workload} {n}", workload=workload, score=float(n < 10 * share))
        for workload, share in successes.items()
        for n in range(10)
    ]
    settings = {"role": "held_out", "memory": True, "seconds": 1.0}
    return Evaluation(suite=suite, suite_hash=suite_hash, generation=generation, outcomes=outcomes, **settings)


def test_retention_is_the_best_of_the_earlier_champions_against_the_present_one():
    found = [
        measured(1, sums=0.9, words=0.4),
        measured(2, sums=0.6, words=0.5),
        measured(3, sums=1.0),
        measured(4, sums=0.2, words=0.6),
        measured(4, sums=0.5, words=0.7),
    ]
    before, now = retention(found, [1, 2, 4])
    assert before == pytest.approx({"sums": 0.9, "words": 0.5})
    assert now == pytest.approx({"sums": 0.5, "words": 0.7})


def test_other_suites_are_no_measure_of_retention():
    found = [measured(1, suite_hash="old", sums=0.9), measured(1, suite="chat", sums=0.9), measured(2, sums=0.5)]
    assert retention(found, [1, 2]) == ({}, {"sums": 0.5})
    assert retention([], [0]) == ({}, {})


def test_of_a_suite_that_has_changed_the_tasks_that_are_left_of_it_measure_retention():
    def asked(evaluation: Evaluation, suite_hash: str, tasks: slice) -> Evaluation:
        outcomes = [o.model_copy(update={"task_hash": o.key}) for o in evaluation.outcomes[tasks]]
        return evaluation.model_copy(update={"outcomes": outcomes, "suite_hash": suite_hash})

    found = [
        asked(measured(1, sums=0.8), "first", slice(0, 8)),
        asked(measured(2, sums=1.0), "second", slice(8, 10)),
        asked(measured(3, sums=0.5), "third", slice(0, 10)),
    ]
    before, now = retention(found, [1, 2, 3], fewest=5)
    assert before == pytest.approx({"sums": 1.0})
    assert now == pytest.approx({"sums": 5 / 8})
    assert retention(found, [1, 2, 3], fewest=9) == ({}, {"sums": 0.5})
