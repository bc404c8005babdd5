"""Will the own model solve this task? Told from how similar tasks went before it is tried.

V_0 (arXiv 2602.03584) predicts success at state zero from a policy's past (prompt, outcome) pairs; here the
nearest neighbours on embeddings, Beta-smoothed, then made calibrated by isotonic regression on the history itself,
each outcome predicted from the others. Pure: vectors and outcomes in, a probability out. Owns no storage, no routing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MIN_OUTCOMES = 20
"""With fewer nothing is predicted."""

MIN_CALIBRATED = 60
"""With fewer the smoothed share of the neighbours stands as it is."""

NEIGHBOURS = 32

WIDTH = 0.15
"""Of the kernel: a neighbour whose cosine is this much lower counts for 1/e."""

STALE = 0.5
"""What an outcome counts for, per generation that lies between: the model has changed since."""


@dataclass(frozen=True)
class PastOutcome:
    """How one task went: its question's unit vector, and which generation tried it."""

    vector: Sequence[float]
    success: bool
    generation: int


class Predictor:
    """Success foretold for one generation; `fit` makes it."""

    def __init__(self, vectors: Any, successes: Any, weights: Any, prior: float, curve: tuple[Any, Any] | None) -> None:
        self._vectors = vectors
        self._successes = successes
        self._weights = weights
        self._prior = prior
        self._curve = curve

    def __call__(self, vector: Sequence[float]) -> float:
        """The probability in 0..1 that a task with this question succeeds."""
        import numpy as np

        similarity = self._vectors @ np.asarray(vector, dtype=np.float32)
        raw = float(_smoothed(similarity[None, :], self._successes, self._weights, self._prior)[0])
        return raw if self._curve is None else float(np.interp(raw, *self._curve))


def fit(history: Sequence[PastOutcome], generation: int) -> Predictor | None:
    """A predictor for `generation` from all outcomes; None when there are too few to say anything."""
    import numpy as np

    if len(history) < MIN_OUTCOMES:
        return None
    vectors = np.asarray([past.vector for past in history], dtype=np.float32)
    successes = np.asarray([past.success for past in history], dtype=float)
    weights = np.asarray([STALE ** abs(past.generation - generation) for past in history])
    prior = float((weights @ successes + 1) / (weights.sum() + 2))
    curve = None
    if len(history) >= MIN_CALIBRATED:
        similarity = vectors @ vectors.T
        np.fill_diagonal(similarity, -np.inf)  # an outcome must not foretell itself
        curve = _isotonic(_smoothed(similarity, successes, weights, prior), successes, weights)
    return Predictor(vectors, successes, weights, prior, curve)


def _smoothed(similarity: Any, successes: Any, weights: Any, prior: float) -> Any:
    """For each row the neighbours' weighted success, as if `prior` had been seen once more."""
    import numpy as np

    k = min(NEIGHBOURS, similarity.shape[1])
    near = np.argpartition(-similarity, k - 1, axis=1)[:, :k]
    kernel = np.exp((np.take_along_axis(similarity, near, axis=1) - 1.0) / WIDTH) * weights[near]
    return (prior + (kernel * successes[near]).sum(axis=1)) / (1.0 + kernel.sum(axis=1))


def _isotonic(raw: Any, successes: Any, weights: Any) -> tuple[Any, Any]:
    """The rising curve that fits best (pool adjacent violators), as points to interpolate between.

    Each pool is Beta-smoothed, so that no pool of a few outcomes says never or always.
    """
    import numpy as np

    pools: list[list[float]] = []  # weight, weighted success, weighted raw
    for i in np.argsort(raw, kind="stable"):
        pools.append([weights[i], weights[i] * successes[i], weights[i] * raw[i]])
        while len(pools) > 1 and _height(pools[-2]) >= _height(pools[-1]):
            last = pools.pop()
            pools[-1] = [a + b for a, b in zip(pools[-1], last, strict=True)]
    points = np.asarray([[x / w, _height([w, s, x])] for w, s, x in pools])
    return points[:, 0], np.maximum.accumulate(points[:, 1])


def _height(pool: list[float]) -> float:
    return (pool[1] + 0.5) / (pool[0] + 1.0)
