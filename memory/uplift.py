"""What an item is worth, measured: how runs that were shown it did against runs from which it was withheld.

Arithmetic on counts. Owns no counting (`memory.uses`) and no decision about an item (`memory.life`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

Z = 1.959963984540054
"""Two-sided 95%."""

PRIOR = 10.0
"""Runs that each side is shrunken by, towards what both did together."""


@dataclass(frozen=True)
class Count:
    """Judged runs and how many of them succeeded."""

    n: int = 0
    successes: int = 0

    @property
    def rate(self) -> float | None:
        """Share of successes; None when nothing was counted."""
        return self.successes / self.n if self.n else None

    def __add__(self, other: Count) -> Count:
        return Count(self.n + other.n, self.successes + other.successes)


@dataclass(frozen=True)
class Exposure:
    """An item's judged runs, with it in the prompt and without."""

    shown: Count = Count()
    withheld: Count = Count()

    def __add__(self, other: Exposure) -> Exposure:
        return Exposure(self.shown + other.shown, self.withheld + other.withheld)


@dataclass(frozen=True)
class Uplift:
    """Success with the item minus success without it, in -1..1; always `low <= value <= high`."""

    value: float
    low: float
    high: float


def wilson(count: Count) -> tuple[float, float]:
    """Wilson's 95% score interval (1927) of a success rate; (0, 1) when nothing was counted."""
    n = count.n
    if n == 0:
        return 0.0, 1.0
    rate = count.successes / n
    centre = rate + Z * Z / (2 * n)
    spread = Z * math.sqrt(rate * (1 - rate) / n + Z * Z / (4 * n * n))
    scale = 1 + Z * Z / n
    # At the ends rounding may put the bound a hair on the wrong side of the rate.
    low, high = min(rate, (centre - spread) / scale), max(rate, (centre + spread) / scale)
    return max(0.0, low), min(1.0, high)


def uplift(exposure: Exposure) -> Uplift | None:
    """The difference with Newcombe's 95% interval (1998, method 10); None unless both sides were seen."""
    with_it, without = exposure.shown.rate, exposure.withheld.rate
    if with_it is None or without is None:
        return None
    low_1, high_1 = wilson(exposure.shown)
    low_2, high_2 = wilson(exposure.withheld)
    value = with_it - without
    low = value - math.hypot(with_it - low_1, high_2 - without)
    high = value + math.hypot(high_1 - with_it, without - low_2)
    return Uplift(value, max(-1.0, low), min(1.0, high))


def shrunken(exposure: Exposure, at_least: int) -> float | None:
    """The difference for ranking, pulled towards 0 while runs are few; None below `at_least` runs on either side."""
    shown, withheld = exposure.shown, exposure.withheld
    if min(shown.n, withheld.n) < max(1, at_least):
        return None
    together = (shown.successes + withheld.successes) / (shown.n + withheld.n)

    def rate(count: Count) -> float:
        return (count.successes + PRIOR * together) / (count.n + PRIOR)

    return rate(shown) - rate(withheld)
