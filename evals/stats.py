"""Statistics of evaluations: an interval for one success rate, and the paired difference of two.

Owns arithmetic on plain numbers. Owns no records and no decisions (`evals.gate`).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

from memory.errors import ConfigError

RESAMPLES = 10_000
SEED = 20_240_607
TIE = 1e-12
"""Two scores nearer than this are the same score."""


@dataclass(frozen=True)
class Difference:
    """How much better the second arm did than the first, over the same tasks.

    `points`, `low` and `high` are in percentage points (-100..100). `low <= points <= high` always
    holds. An interval of [0, 0] means that no pair differed: nothing was seen, nothing is proven.
    """

    points: float
    low: float
    high: float
    p_value: float
    n: int
    better: int
    """Pairs in which the second arm scored more."""
    worse: int


def wilson(successes: int, n: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval (1927) for a success rate: (low, high) in 0..1, two-sided at `level`.

    Nothing measured (`n` = 0) gives (0, 1): everything is possible.

    Raises: ConfigError when `successes` is not in 0..n or `level` not in 0..1.
    """
    _check_level(level)
    if not 0 <= successes <= n:
        raise ConfigError(f"successes must be in 0..{n}, got {successes}")
    if n == 0:
        return 0.0, 1.0
    z = NormalDist().inv_cdf(0.5 + level / 2)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    low = 0.0 if successes == 0 else (centre - spread) / scale
    high = 1.0 if successes == n else (centre + spread) / scale
    return low, high


def sign_test(better: int, worse: int, one_sided: bool = False) -> float:
    """Exact binomial p-value for `better` wins against `worse` losses under a fair coin.

    For success and failure this is McNemar's exact test (1947). One-sided asks whether the wins
    outweigh. No discordant pair gives 1.
    """
    flips = better + worse
    if flips == 0:
        return 1.0

    def at_least(wins: int) -> float:
        return sum(math.comb(flips, k) for k in range(wins, flips + 1)) / 2**flips

    return at_least(better) if one_sided else min(1.0, 2 * at_least(max(better, worse)))


def paired_difference(
    a: Sequence[bool | float],
    b: Sequence[bool | float],
    level: float = 0.95,
    one_sided: bool = False,
    strata: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    seed: int = SEED,
) -> Difference:
    """The gain of `b` over `a`, whose i-th entries (in 0..1) are the same task done by both.

    The bounds are a percentile bootstrap over pairs (Efron 1979) with a fixed seed, drawn within each
    stratum (a task's workload) so that the mix of workloads stays as it is; strata of one task are
    pooled. Two-sided: `low` and `high` hold the middle `level`. One-sided: each alone is a bound at
    `level`. `p_value` is exact, from wins and losses, one-sided for `b` being better.

    A bootstrap of few or uniform pairs is too sure of itself (three wins in three pairs give
    [100, 100]); the p-value is not. Read both.

    Raises: ConfigError when lengths differ or `level` is not in 0..1.
    """
    _check_level(level)
    if len(a) != len(b) or (strata is not None and len(strata) != len(a)):
        raise ConfigError(f"paired arms and strata must have one entry per task, got {len(a)} and {len(b)}")
    gains = [float(y) - float(x) for x, y in zip(a, b, strict=True)]
    better = sum(g > TIE for g in gains)
    worse = sum(g < -TIE for g in gains)
    p_value = sign_test(better, worse, one_sided)
    if not gains:
        return Difference(0.0, -100.0, 100.0, p_value, 0, 0, 0)
    if better == worse == 0:
        return Difference(0.0, 0.0, 0.0, p_value, len(gains), 0, 0)
    points = 100 * math.fsum(gains) / len(gains)
    tail = (1 - level) if one_sided else (1 - level) / 2
    low, high = _bootstrap(gains, strata, tail, resamples, seed)
    return Difference(points, min(low, points), max(high, points), p_value, len(gains), better, worse)


def _bootstrap(
    gains: Sequence[float], strata: Sequence[str] | None, tail: float, resamples: int, seed: int
) -> tuple[float, float]:
    import numpy as np

    names = strata if strata is not None else [""] * len(gains)
    sizes = Counter(names)
    groups: dict[str | None, list[float]] = {}
    for name, gain in zip(names, gains, strict=True):
        groups.setdefault(name if sizes[name] > 1 else None, []).append(gain)
    rng = np.random.default_rng(seed)
    totals = np.zeros(resamples)
    for group in groups.values():
        values = np.asarray(group)
        totals += values[rng.integers(0, len(values), size=(resamples, len(values)))].sum(axis=1)
    low, high = np.quantile(100 * totals / len(gains), [tail, 1 - tail])
    return float(low), float(high)


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ConfigError(f"a confidence level lies between 0 and 1, got {level}")
