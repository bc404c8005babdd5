"""The predicted chance of success is calibrated, sharper than the mean, and follows the model's changes."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from memory.embed import Embedder
from memory.predictor import MIN_OUTCOMES, PastOutcome, fit

RATES = {0: 0.05, 1: 0.35, 2: 0.65, 3: 0.95}
"""Kind of task -> how often it is solved."""


def near(kind: int, dice: random.Random, spread: float = 0.15) -> list[float]:
    vector = [dice.gauss(0, spread) + (1.0 if i == kind else 0.0) for i in range(8)]
    length = sum(x * x for x in vector) ** 0.5
    return [x / length for x in vector]


def lived(count: int, seed: int, generation: int = 0, rates: dict[int, float] = RATES) -> list[PastOutcome]:
    dice = random.Random(seed)
    kinds = [dice.choice(sorted(rates)) for _ in range(count)]
    return [PastOutcome(near(kind, dice), dice.random() < rates[kind], generation) for kind in kinds]


@pytest.mark.parametrize("seed", range(4))
def test_what_is_foretold_at_a_chance_comes_true_as_often(seed: int):
    predict = fit(lived(600, seed), 0)
    assert predict is not None
    fresh = lived(1500, 100 + seed)
    told = [(predict(past.vector), past.success) for past in fresh]
    bins = [[(p, s) for p, s in told if low <= p < low + 0.2] for low in (0.0, 0.2, 0.4, 0.6, 0.8)]
    error = sum(abs(sum(p for p, _ in b) - sum(s for _, s in b)) for b in bins) / len(told)
    assert error < 0.06
    brier = sum((p - s) ** 2 for p, s in told) / len(told)
    base = sum(s for _, s in told) / len(told)
    assert brier < 0.8 * base * (1 - base)


def test_the_curve_makes_up_for_neighbours_that_mislead():
    """Two kinds that the embedding cannot tell apart, beside one that it can: the raw share is pulled to the middle."""
    dice = random.Random(1)
    history = [PastOutcome(near(0, dice, 0.6), dice.random() < 0.1, 0) for _ in range(300)]
    history += [PastOutcome(near(1, dice, 0.6), dice.random() < 0.9, 0) for _ in range(300)]
    predict = fit(history, 0)
    assert predict is not None
    told = [(predict(near(kind, dice, 0.6)), (0.1, 0.9)[kind]) for kind in (0, 1) for _ in range(300)]
    assert abs(sum(p for p, _ in told) - sum(r for _, r in told)) / len(told) < 0.05


def test_too_short_a_history_says_nothing():
    assert fit(lived(MIN_OUTCOMES - 1, 0), 0) is None
    assert fit(lived(MIN_OUTCOMES, 0), 0) is not None


def test_a_new_generations_own_outcomes_outweigh_the_old_ones():
    failed = lived(100, 1, generation=1, rates={0: 0.0, 3: 0.9})
    solved = lived(60, 2, generation=4, rates={0: 1.0, 3: 0.9})
    before, after = fit(failed, 1), fit([*failed, *solved], 4)
    assert before is not None
    assert after is not None
    hard = near(0, random.Random(3))
    assert before(hard) < 0.15
    assert after(hard) > 0.8


@hypothesis_settings(max_examples=25, deadline=None)
@given(st.integers(MIN_OUTCOMES, 120), st.integers(0, 10**6), st.sampled_from([0.0, 0.5, 1.0]))
def test_it_is_a_probability_and_the_same_each_time(count: int, seed: int, rate: float):
    history = lived(count, seed, rates={0: rate, 1: rate})
    first, again = fit(history, 0), fit(history, 0)
    assert first is not None
    assert again is not None
    for past in lived(5, seed + 1):
        assert 0.0 < first(past.vector) < 1.0
        assert first(past.vector) == again(past.vector)


def test_real_questions_of_hard_and_easy_kinds_are_told_apart(embedder: Embedder):
    dice = random.Random(0)
    hard = [f"How many primes are there below {dice.randint(10**4, 10**6)}?" for _ in range(40)]
    easy = [f"Write the word number {dice.randint(1, 99)} in capital letters, please." for _ in range(40)]
    history = [
        PastOutcome(vector, success, 0)
        for texts, success in ((hard, False), (easy, True))
        for vector in embedder.embed(texts)
    ]
    predict = fit(history, 0)
    assert predict is not None
    (one, other) = embedder.embed(["How many primes are there below 777777?", "Write the word number 5 in capitals."])
    assert predict(one) < 0.25 < 0.75 < predict(other)
