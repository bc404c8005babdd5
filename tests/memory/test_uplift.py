"""The arithmetic of an item's worth."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from memory.uplift import Count, Exposure, shrunken, uplift, wilson

counts = st.integers(0, 200).flatmap(lambda n: st.builds(Count, st.just(n), st.integers(0, n)))


def test_wilson_is_the_published_interval():
    # Newcombe 1998, table I: 81 of 263.
    assert wilson(Count(263, 81)) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson(Count()) == (0.0, 1.0)


def test_the_interval_of_a_difference_is_newcombes():
    # Newcombe 1998 (Statistics in Medicine 17:873), table II: 56/70 against 48/80, method 10.
    found = uplift(Exposure(Count(70, 56), Count(80, 48)))
    assert found is not None
    assert (found.value, found.low, found.high) == pytest.approx((0.2, 0.0524, 0.3339), abs=5e-5)


@given(counts, counts)
def test_a_difference_lies_in_its_interval_and_turns_with_its_sides(shown: Count, withheld: Count):
    found, turned = uplift(Exposure(shown, withheld)), uplift(Exposure(withheld, shown))
    if not shown.n or not withheld.n:
        assert found is None
        return
    assert found is not None
    assert turned is not None
    assert -1.0 <= found.low <= found.value <= found.high <= 1.0
    assert (turned.low, turned.high) == pytest.approx((-found.high, -found.low))


@given(counts, counts)
def test_a_shrunken_uplift_has_the_same_sign_and_is_no_larger(shown: Count, withheld: Count):
    exposure = Exposure(shown, withheld)
    small, found = shrunken(exposure, 1), uplift(exposure)
    if small is None or found is None:
        assert min(shown.n, withheld.n) == 0
        return
    assert abs(small) <= abs(found.value) + 1e-12
    assert small * found.value >= -1e-12


def test_few_runs_say_nothing():
    assert shrunken(Exposure(Count(9, 9), Count(40, 0)), 10) is None
    assert shrunken(Exposure(Count(10, 10), Count(10, 0)), 10) == pytest.approx(0.5)
