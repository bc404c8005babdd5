"""The bandit spends its budget exactly, on what can be learned now, and gives the same plan for the same night."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from distill.practice import Arm, Choice, Plan, Try, plan


def arm(name: str) -> Arm:
    return ("default", name)


def choices(name: str, count: int) -> list[Choice]:
    return [Choice(arm(name), f"{name}-{n}", f"task_{name}_{n:03d}") for n in range(count)]


def tries(name: str, rate: float, count: int, generation: int = 0) -> list[Try]:
    """Tries of as many questions, solved at a rate."""
    return [Try(arm(name), f"{name}-{n}", generation, (n + 1) * rate // 1 > n * rate // 1) for n in range(count)]


def drawn(made: Plan) -> dict[str, int]:
    return {figures.workload: figures.chosen for figures in made.arms}


def total(history: list[Try], budget: int = 12, kinds: tuple[str, ...] = ("a", "b")) -> dict[str, int]:
    """How often each workload was chosen over many seeds."""
    counts = dict.fromkeys(kinds, 0)
    for seed in range(30):
        offered = [choice for kind in kinds for choice in choices(kind, 40)]
        for kind, number in drawn(plan(offered, history, budget=budget, samples=4, seed=seed)).items():
            counts[kind] += number
    return counts


@hypothesis_settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 30),
    st.dictionaries(st.sampled_from("abcd"), st.tuples(st.integers(1, 12), st.integers(0, 20)), max_size=4),
    st.integers(0, 99),
)
def test_the_budget_is_spent_to_the_last_task_and_no_task_twice(
    budget: int, kinds: dict[str, tuple[int, int]], seed: int
):
    offered = [choice for kind, (count, _) in kinds.items() for choice in choices(kind, count)]
    history = [one for kind, (_, tried) in kinds.items() for one in tries(kind, 0.3, tried)]
    made = plan(offered, history, budget=budget, samples=4, seed=seed)
    assert len(made.task_ids) == min(budget, len(offered))
    assert len(set(made.task_ids)) == len(made.task_ids)
    assert sum(drawn(made).values()) == len(made.task_ids)
    random.Random(seed).shuffle(offered)
    assert plan(offered, history, budget=budget, samples=4, seed=seed) == made


def test_another_seed_gives_another_plan():
    offered = [*choices("a", 40), *choices("b", 40)]
    plans = {tuple(plan(offered, [], budget=8, samples=4, seed=seed).task_ids) for seed in range(5)}
    assert len(plans) == 5


def test_half_solved_workloads_are_preferred_to_hopeless_and_to_mastered_ones():
    history = [*tries("a", 0.5, 120), *tries("b", 0.0, 120), *tries("c", 1.0, 120)]
    counts = total(history, kinds=("a", "b", "c"))
    assert counts["a"] > 3 * counts["b"]
    assert counts["a"] > 3 * counts["c"]


def test_a_workload_that_moves_is_preferred_to_one_that_stands_at_the_same_success():
    moving = [*tries("a", 0.1, 60, generation=0), *tries("a", 0.4, 60, generation=1)]
    standing = [*tries("b", 0.4, 60, generation=0), *tries("b", 0.4, 60, generation=1)]
    counts = total([*moving, *standing])
    assert counts["a"] > counts["b"]


def test_what_was_never_tried_is_looked_into_first():
    assert total([*tries("a", 0.5, 200)], budget=2)["b"] >= 55


def test_a_workload_whose_questions_are_each_always_or_never_solved_teaches_nothing():
    """On average half solved; tries of the same question all end alike, so no try says more than another."""
    stuck = [Try(arm("a"), f"a-{n}", 0, n % 2 == 0) for n in range(40) for _ in range(4)]
    open_ = [Try(arm("b"), f"b-{n}", 0, k % 2 == 0) for n in range(40) for k in range(4)]
    made = plan([*choices("a", 40), *choices("b", 40)], [*stuck, *open_], budget=20, samples=4, seed=1)
    stands, moves = made.arms
    assert stands.success == moves.success
    assert (stands.advantage, moves.advantage) == (0.0, 1.0)
    assert moves.chosen > 3 * stands.chosen


def test_within_a_workload_the_questions_near_half_come_first():
    history = [Try(arm("a"), f"a-{n}", 0, k % 2 == 0 if n < 5 else n % 2 == 0) for n in range(40) for k in range(8)]
    hits = 0
    for seed in range(30):
        made = plan(choices("a", 40), history, budget=5, samples=4, seed=seed)
        hits += sum(int(id[-3:]) < 5 for id in made.task_ids)
    assert hits > 2 * 30 * 5 * 5 / 40


def test_many_workloads_of_one_question_each_do_not_take_the_budget_of_a_workload_that_teaches():
    junk = [Choice(arm(f"junk {n}"), f"junk-{n}", f"task_junk_{n:03d}") for n in range(30)]
    for seed in range(10):
        made = plan([*choices("a", 40), *junk], tries("a", 0.5, 40), budget=16, samples=4, seed=seed)
        assert drawn(made)["a"] >= 8
        assert sum(drawn(made).values()) == 16


def test_tenants_share_the_budget_however_many_workloads_one_of_them_names():
    many = [Choice(("rival", f"kind {n % 20}"), f"q-{n}", f"task_r_{n:03d}") for n in range(200)]
    made = plan([*choices("a", 40), *many], tries("a", 0.5, 40), budget=16, samples=4, seed=0)
    assert drawn(made)["a"] == 8
    few = plan([*choices("a", 3), *many], [], budget=16, samples=4, seed=0)
    assert drawn(few)["a"] == 3, "what one tenant has no tasks for goes to the others"
    assert len(few.task_ids) == 16


def test_tenants_that_a_small_budget_leaves_out_have_their_turn_in_the_nights_that_follow():
    offered = [Choice((f"tenant {n}", "sums"), f"q-{n}-{i}", f"task_{n}_{i}") for n in range(12) for i in range(8)]
    owner = {choice.task_id: choice for choice in offered}
    history: list[Try] = []
    for night in range(3):
        made = plan(offered, history, budget=4, samples=1, seed=0)
        history += [Try(owner[id].arm, owner[id].question, night, False) for id in made.task_ids]
    assert len({one.arm for one in history}) == 12
