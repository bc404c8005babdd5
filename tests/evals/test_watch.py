from __future__ import annotations

import random
from statistics import median

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.watch import Tally, tally, watch
from memory.errors import ConfigError
from memory.records import Outcome, OutcomeSource

counts = st.tuples(st.integers(0, 60), st.integers(0, 60)).map(lambda c: Tally(n=max(c), successes=min(c)))


def found_after(old: Tally, rate: float, rng: random.Random, most: int) -> int | None:
    """The first new outcome after which the watch, asked after each, says `worse`."""
    good = 0
    for n in range(1, most + 1):
        good += rng.random() < rate
        if watch(old, Tally(n=n, successes=good)).worse:
            return n
    return None


def draw(rate: float, n: int, rng: random.Random) -> Tally:
    return Tally(n=n, successes=sum(rng.random() < rate for _ in range(n)))


@pytest.mark.parametrize(("rate", "before"), [(0.5, 50), (0.8, 80), (0.8, 10)])
def test_looking_after_every_outcome_raises_no_more_false_alarms_than_it_may(rate: float, before: int) -> None:
    rng, nights = random.Random(7), 100
    alarms = sum(found_after(draw(rate, before, rng), rate, rng, 100) is not None for _ in range(nights))
    assert alarms <= 0.05 * nights


def test_a_canary_whose_two_sides_grow_together_raises_no_more_false_alarms_either() -> None:
    rng, nights, alarms = random.Random(11), 100, 0
    for _ in range(nights):
        good, n = [0, 0], [0, 0]
        for _ in range(120):
            side = rng.random() < 0.3
            n[side] += 1
            good[side] += rng.random() < 0.7
            if watch(Tally(n=n[0], successes=good[0]), Tally(n=n[1], successes=good[1])).worse:
                alarms += 1
                break
    assert alarms <= 0.05 * nights


@pytest.mark.parametrize("rate", [0.95, 0.8, 0.65])
def test_a_fall_of_30_points_is_found_within_about_60_outcomes(rate: float) -> None:
    rng = random.Random(13)
    found = [found_after(draw(rate, 200, rng), rate - 0.3, rng, 120) or 999 for _ in range(60)]
    assert median(found) <= 60
    assert sum(n < 999 for n in found) >= 0.9 * len(found)


def test_a_generation_that_fails_everything_is_found_within_a_dozen() -> None:
    found = found_after(Tally(n=100, successes=80), 0.0, random.Random(1), 100)
    assert found is not None
    assert found <= 12


def test_nothing_seen_on_either_side_is_no_evidence() -> None:
    for old, new in [(Tally(), Tally(n=9)), (Tally(n=9, successes=9), Tally())]:
        verdict = watch(old, new)
        assert (verdict.worse, verdict.evidence, verdict.p_value) == (False, 1.0, 1.0)


def test_the_verdict_tells_its_evidence() -> None:
    verdict = watch(Tally(n=100, successes=90), Tally(n=50, successes=20))
    assert verdict.worse
    assert verdict.evidence > 20
    assert verdict.p_value < 0.05
    assert "90/100 (90%) before, 20/50 (40%) now" in verdict.told


def test_only_a_verifiers_and_a_users_word_count() -> None:
    said = [Outcome(score=1.0, by=by) for by in OutcomeSource]
    assert tally([*said, None, Outcome(score=0.5, by=OutcomeSource.USER)]) == Tally(n=3, successes=2)


def test_praise_by_a_critic_does_not_hide_a_fall() -> None:
    failed = [Outcome(score=0.0, by=OutcomeSource.VERIFIER)] * 20
    praised = [Outcome(score=1.0, by=OutcomeSource.CRITIC)] * 500
    assert watch(Tally(n=100, successes=90), tally([*failed, *praised])).worse


@pytest.mark.parametrize("level", [0.4, 1.0])
def test_a_level_that_means_nothing_is_refused(level: float) -> None:
    with pytest.raises(ConfigError, match="level"):
        watch(Tally(), Tally(), level)


@settings(deadline=None, max_examples=80)
@given(counts, counts)
def test_no_better_rate_is_ever_called_worse_and_one_failure_more_never_helps(old: Tally, new: Tally) -> None:
    verdict = watch(old, new)
    assert 0 < verdict.p_value <= 1
    if new.rate >= old.rate:
        assert not verdict.worse
    if old.n and new.n and new.rate < old.rate:
        assert watch(old, Tally(n=new.n + 1, successes=new.successes)).p_value <= verdict.p_value * 1.001


@settings(deadline=None, max_examples=10)
@given(st.floats(0.05, 0.95), st.floats(0.05, 0.95), st.integers(1, 5), st.integers(1, 5))
def test_under_the_null_the_evidence_is_worth_at_most_one_on_average(a: float, b: float, m: int, n: int) -> None:
    from math import comb

    old_rate, new_rate = min(a, b), max(a, b)
    mean = sum(
        comb(m, x) * old_rate**x * (1 - old_rate) ** (m - x)
        * comb(n, y) * new_rate**y * (1 - new_rate) ** (n - y)
        * watch(Tally(n=m, successes=x), Tally(n=n, successes=y)).evidence
        for x in range(m + 1)
        for y in range(n + 1)
    )  # fmt: skip
    assert mean <= 1 + 1e-9
