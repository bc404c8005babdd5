"""`weighted_successes`: `successes`, each weighted by how seldom its question is solved.

RLoop (arXiv 2511.04285) fine-tunes on pooled successes with a focus on hard prompts; NFT (arXiv 2505.18116) weighs a
prompt by 1 - r, r being its success rate. What is solved every time has little left to teach.

The rule: an example's weight is c * (1 - r). r is the success rate of its question's judged runs, with one success
and one failure added (Laplace), or that of its workload's where the question was tried once. c is the same for all,
such that the recipe's examples weigh 1 on average, with every weight kept within 0.25 and 2.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from statistics import fmean

from distill.recipes.successes import successes
from distill.snapshot import Snapshot, judged_blindly
from memory.records import Example, OutcomeSource, Task

LEAST, MOST = 0.25, 2.0
"""The bounds of a weight: an easy question is still rehearsed, and one lucky success does not lead the night."""

DIGITS = 4


def weighted_successes(snapshot: Snapshot) -> Iterator[Example]:
    """The examples of `successes`, in their order, under weights of mean 1. To stand in
    `night.recipes` instead of it: of two that teach the same, the first recipe's stays."""
    examples = list(successes(snapshot))
    rates = _Rates(snapshot)
    weights = _of_mean_one([1 - rates.of(snapshot.tasks[e.task_id]) for e in examples])
    for example, weight in zip(examples, weights, strict=True):
        yield example.model_copy(update={"recipe": "weighted_successes", "weight": weight})


class _Rates:
    """Success rates of the snapshot's judged runs, by question and by workload."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._questions: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
        self._workloads: defaultdict[tuple[str, str], list[bool]] = defaultdict(list)
        for trajectory in snapshot.trajectories:
            task, outcome = snapshot.tasks.get(trajectory.task_id), snapshot.outcome(trajectory)
            if task is None or outcome is None or (outcome.by is OutcomeSource.VERIFIER and judged_blindly(task)):
                continue
            self._questions[task.tenant, task.fingerprint].append(outcome.success)
            self._workloads[task.tenant, task.workload].append(outcome.success)

    def of(self, task: Task) -> float:
        """The rate that the task's examples are weighted by."""
        tried = self._questions[task.tenant, task.fingerprint]
        if len(tried) < 2:
            tried = self._workloads[task.tenant, task.workload]
        return (sum(tried) + 1) / (len(tried) + 2)


def _of_mean_one(raw: Sequence[float]) -> list[float]:
    """The same figures, all above 0, times one factor and within the bounds, so that their mean is 1."""
    if not raw:
        return []

    def scaled(factor: float) -> list[float]:
        return [min(MOST, max(LEAST, factor * weight)) for weight in raw]

    # The mean grows with the factor, from LEAST to MOST: halving the span finds where it is 1.
    low, high = 0.0, MOST / min(raw)
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if fmean(scaled(middle)) < 1 else (low, middle)
    return [round(weight, DIGITS) for weight in scaled(high)]
