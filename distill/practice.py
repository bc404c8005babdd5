"""Which earlier tasks are worth another try tonight: a bandit over workloads by what is learned from them.

SEC (arXiv 2505.14970): an arm's value is the mean |advantage| of its tries, carried on from step to step; DUMP (arXiv
2504.09710): plus an upper-confidence bonus, drawn by softmax at temperature 0.1. For right or wrong answers the
advantage is largest at 50% success, and zero where all tries end alike. On top comes how far success has moved since
the generation before: what moves is being learned, or forgotten.

Pure: records in, a plan out. Owns no runs (`serve.stages.practice`).
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from pydantic import BaseModel

Arm = tuple[str, str]
"""(tenant, workload)."""

TEMPERATURE = 0.1
CARRIED = 0.3
"""What of an arm's value is kept when the next generation's tries are in (SEC's 1 - alpha; the paper names none)."""

MIN_MOVED = 4
"""Tries by each of two generations before their difference counts as a move."""


@dataclass(frozen=True)
class Try:
    """One judged run of an earlier task."""

    arm: Arm
    question: str
    """The task's fingerprint: tries of the same one are compared with each other."""
    generation: int
    success: bool


@dataclass(frozen=True)
class Choice:
    """A task that may be practised."""

    arm: Arm
    question: str
    task_id: str


class ArmFigures(BaseModel):
    """Why a workload got its share."""

    tenant: str
    workload: str
    tasks: int
    """That could be practised."""
    tries: int
    success: float
    """Laplace-smoothed."""
    advantage: float
    """Mean |advantage|, scaled so that 50% success gives 1, carried on over generations."""
    moved: float
    """How far success is from that of the generation before."""
    score: float
    """What the softmax began with: advantage, move, and the bonus for what was seldom tried."""
    chosen: int

    @property
    def why(self) -> str:
        """The largest part of its score, in words."""
        parts = {
            "its tries end differently": self.advantage,
            "its success has moved": self.moved,
            "seldom tried": self.score - self.advantage - self.moved,
        }
        return max(parts, key=lambda part: parts[part]) if self.tries else "never tried"


@dataclass(frozen=True)
class Plan:
    """What to practise, in order, and the reasons."""

    task_ids: list[str]
    arms: list[ArmFigures]


@dataclass
class _Standing:
    tries: list[Try] = field(default_factory=list[Try])
    tasks: list[Choice] = field(default_factory=list[Choice])
    drawn: int = 0


def plan(choices: Iterable[Choice], history: Iterable[Try], *, budget: int, samples: int, seed: int) -> Plan:
    """`budget` tasks (all, when there are fewer) for `samples` tries each; the same arguments give the same plan.

    `history` in the order in which it happened. A question is chosen once, however often it was asked.
    """
    arms: defaultdict[Arm, _Standing] = defaultdict(_Standing)
    by_question: defaultdict[tuple[Arm, str], list[bool]] = defaultdict(list)
    distinct = {(choice.arm, choice.question): choice for choice in sorted(choices, key=lambda c: c.task_id)}
    for key in sorted(distinct):
        arms[key[0]].tasks.append(distinct[key])
    for one in history:
        if one.arm in arms:
            arms[one.arm].tries.append(one)
            by_question[one.arm, one.question].append(one.success)
    left = {arm: list(arms[arm].tasks) for arm in sorted(arms)}
    values = {arm: (_advantage(arms[arm].tries), _moved(arms[arm].tries)) for arm in left}
    total = sum(len(standing.tries) for standing in arms.values())
    begun = {arm: sum(values[arm]) + _bonus(total, len(arms[arm].tries)) for arm in left}
    dice, chosen = random.Random(seed), list[str]()
    while len(chosen) < budget and any(left.values()):
        open_arms = [arm for arm, tasks in left.items() if tasks]
        done = total + samples * len(chosen)
        scores = [sum(values[a]) + _bonus(done, len(arms[a].tries) + samples * arms[a].drawn) for a in open_arms]
        arm = dice.choices(open_arms, _softmax(scores))[0]
        mean = _smoothed([one.success for one in arms[arm].tries])
        weights = [_worth(by_question[arm, task.question], mean) for task in left[arm]]
        task = dice.choices(left[arm], weights)[0]
        left[arm].remove(task)
        arms[arm].drawn += 1
        chosen.append(task.task_id)
    figures = [
        ArmFigures(
            tenant=arm[0],
            workload=arm[1],
            tasks=len(arms[arm].tasks),
            tries=len(arms[arm].tries),
            success=round(_smoothed([one.success for one in arms[arm].tries]), 4),
            advantage=round(values[arm][0], 4),
            moved=round(values[arm][1], 4),
            score=round(begun[arm], 4),
            chosen=arms[arm].drawn,
        )
        for arm in left
    ]
    return Plan(chosen, figures)


def _advantage(tries: Sequence[Try]) -> float:
    """The carried mean |advantage| over the generations in order; 0 without tries."""
    by_generation: defaultdict[int, list[Try]] = defaultdict(list)
    for one in tries:
        by_generation[one.generation].append(one)
    value: float | None = None
    for _, group in sorted(by_generation.items()):
        now = _group_advantage(group)
        value = now if value is None else CARRIED * value + (1 - CARRIED) * now
    return value or 0.0


def _group_advantage(tries: Sequence[Try]) -> float:
    """Twice the mean distance from the question's own mean; a question tried once is compared with the workload's."""
    tried = Counter(one.question for one in tries)
    won = Counter(one.question for one in tries if one.success)
    mean = _smoothed([one.success for one in tries])
    means = {question: won[question] / n if n > 1 else mean for question, n in tried.items()}
    return 2 * fmean(abs(float(one.success) - means[one.question]) for one in tries)


def _moved(tries: Sequence[Try]) -> float:
    """The distance between the success of the last two generations that tried often enough."""
    by_generation: defaultdict[int, list[bool]] = defaultdict(list)
    for one in tries:
        by_generation[one.generation].append(one.success)
    known = [_smoothed(won) for _, won in sorted(by_generation.items()) if len(won) >= MIN_MOVED]
    return abs(known[-1] - known[-2]) if len(known) > 1 else 0.0


def _bonus(total: int, tries: int) -> float:
    return math.sqrt(2 * math.log(total + 1) / (tries + 1))


def _softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    return [math.exp((score - highest) / TEMPERATURE) for score in scores]


def _smoothed(won: Sequence[bool]) -> float:
    return (sum(won) + 1) / (len(won) + 2)


def _worth(won: Sequence[bool], mean: float) -> float:
    """p(1 - p) of a question, whose chance is its workload's until its own tries say otherwise."""
    p = (sum(won) + mean) / (len(won) + 1)
    return p * (1 - p) + 1e-6
