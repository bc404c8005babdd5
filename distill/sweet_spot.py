"""Which of several failures to reject: not the very worst one.

Finding the Sweet Spot (arXiv 2502.16825): with the best answer chosen, the rejected one is best taken near
the mean minus two standard deviations of all scores of the prompt; rejecting the minimum gets worse the
more samples there are. It takes effect with graded scores of five or more runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean, pstdev


def sweet_spot(scores: Iterable[float], failed: Iterable[tuple[float, str]]) -> str:
    """The id of the failed run, given as (score, id), nearest to mean - 2 sigma of all `scores`; ties go to the
    lower score, then the lower id. Raises ValueError when either is empty."""
    every = list(scores)
    if not every:
        raise ValueError("no scores to choose by")
    aim = fmean(every) - 2 * pstdev(every)
    return min(failed, key=lambda one: (round(abs(one[0] - aim), 9), one))[1]
