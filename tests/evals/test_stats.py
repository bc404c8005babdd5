from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.stats import paired_difference, sign_test, wilson
from memory.errors import ConfigError

pairs = st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=40)
scores = st.floats(min_value=0, max_value=1, allow_nan=False)


@pytest.mark.parametrize(
    ("successes", "n", "low", "high"),
    [(0, 10, 0.0, 0.2775), (5, 10, 0.2366, 0.7634), (52, 60, 0.7583, 0.9308)],
)
def test_wilson_gives_the_published_intervals(successes: int, n: int, low: float, high: float) -> None:
    assert wilson(successes, n) == pytest.approx((low, high), abs=1e-4)


@pytest.mark.parametrize(("successes", "n"), [(346, 360), (7, 8), (1, 30)])
def test_wilsons_bounds_solve_the_equation_that_defines_them(successes: int, n: int) -> None:
    for bound in wilson(successes, n):
        assert abs(successes / n - bound) / math.sqrt(bound * (1 - bound) / n) == pytest.approx(1.95996, abs=1e-4)


def test_nothing_measured_leaves_every_rate_possible() -> None:
    assert wilson(0, 0) == (0.0, 1.0)


@given(st.integers(0, 400), st.integers(0, 400), st.floats(0.5, 0.999))
def test_wilson_holds_the_observed_rate_inside_zero_to_one(a: int, b: int, level: float) -> None:
    successes, n = min(a, b), max(a, b)
    low, high = wilson(successes, n, level)
    assert 0 <= low <= high <= 1
    if n:
        assert low <= successes / n <= high


@pytest.mark.parametrize(("successes", "n", "level"), [(3, 2, 0.95), (-1, 2, 0.95), (1, 2, 0.0), (1, 2, 1.0)])
def test_impossible_counts_and_levels_are_refused(successes: int, n: int, level: float) -> None:
    with pytest.raises(ConfigError):
        wilson(successes, n, level)


@pytest.mark.parametrize(
    ("better", "worse", "one_sided", "p"),
    [
        (0, 0, False, 1.0),
        (5, 0, True, 1 / 32),
        (5, 0, False, 1 / 16),
        (0, 5, True, 1.0),
        (10, 2, False, 0.038574),  # 2 * (1 + 12 + 66) / 4096
        (3, 3, False, 1.0),
    ],
)
def test_the_sign_test_is_mcnemars_exact_p(better: int, worse: int, one_sided: bool, p: float) -> None:
    assert sign_test(better, worse, one_sided) == pytest.approx(p, abs=1e-6)


def test_equal_arms_differ_by_nothing_and_prove_nothing() -> None:
    found = paired_difference([True, False] * 20, [True, False] * 20, one_sided=True)
    assert (found.points, found.low, found.high, found.p_value) == (0.0, 0.0, 0.0, 1.0)


def test_no_pairs_leave_every_difference_possible() -> None:
    found = paired_difference([], [])
    assert (found.n, found.points, found.low, found.high, found.p_value) == (0, 0.0, -100.0, 100.0, 1.0)


def test_the_bootstrap_agrees_with_the_normal_interval_on_many_pairs() -> None:
    # 400 pairs, 120 won, 40 lost: 20 points, sd of a pair sqrt(0.4 - 0.04) = 0.6, so 20 +- 1.96 * 3.
    a = [False] * 120 + [True] * 40 + [True] * 240
    b = [True] * 120 + [False] * 40 + [True] * 240
    found = paired_difference(a, b)
    assert found.points == pytest.approx(20)
    assert (found.low, found.high) == pytest.approx((20 - 5.88, 20 + 5.88), abs=0.6)
    one_sided = paired_difference(a, b, one_sided=True)
    assert one_sided.low == pytest.approx(20 - 1.645 * 3, abs=0.6)


def test_stratifying_keeps_a_difference_between_workloads_out_of_the_interval() -> None:
    # One workload is won throughout, the other never: within each nothing varies.
    a, b = [False] * 40, [True] * 20 + [False] * 20
    flat = paired_difference(a, b)
    by_workload = paired_difference(a, b, strata=["won"] * 20 + ["lost"] * 20)
    assert flat.low < 40
    assert (by_workload.low, by_workload.high) == (50, 50)


def test_workloads_of_one_task_are_pooled_so_that_they_still_vary() -> None:
    found = paired_difference([False] * 8, [True] * 4 + [False] * 4, strata=list("abcdefgh"))
    assert found.low < 50 < found.high


def test_partial_scores_count_as_they_are() -> None:
    found = paired_difference([0.2, 0.5, 1.0], [0.7, 0.5, 0.5])
    assert found.points == pytest.approx(0)
    assert (found.better, found.worse) == (1, 1)


def test_the_same_pairs_always_give_the_same_interval() -> None:
    a, b = [True, False] * 15, [True] * 25 + [False] * 5
    assert paired_difference(a, b) == paired_difference(a, b)


def test_arms_of_different_length_are_refused() -> None:
    with pytest.raises(ConfigError, match="one entry per task"):
        paired_difference([True], [True, False])


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(scores, scores), min_size=1, max_size=30), st.booleans())
def test_the_interval_always_holds_the_observed_difference(found: list[tuple[float, float]], one_sided: bool) -> None:
    difference = paired_difference([a for a, _ in found], [b for _, b in found], one_sided=one_sided, resamples=500)
    assert -100 - 1e-9 <= difference.low <= difference.points <= difference.high <= 100 + 1e-9
    assert 0 < difference.p_value <= 1


@settings(deadline=None, max_examples=60)
@given(pairs)
def test_swapping_the_arms_flips_the_sign(found: list[tuple[bool, bool]]) -> None:
    a, b = [x for x, _ in found], [y for _, y in found]
    there, back = paired_difference(a, b, resamples=500), paired_difference(b, a, resamples=500)
    assert back.points == pytest.approx(-there.points)
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low))
    assert back.p_value == there.p_value
