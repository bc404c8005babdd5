"""Which earlier tasks are worth another try tonight: a bandit over workloads by what is learned from them.

SEC (arXiv 2505.14970): an arm's value is the mean |advantage| of its tries, carried on from step to step; DUMP (arXiv
2504.09710): plus an upper-confidence bonus, drawn by softmax at temperature 0.1. For right or wrong answers the
advantage is largest at 50% success, and zero where all tries end alike. On top comes how far success has moved since
the generation before: what moves is being learned, or forgotten.

A workload's name is the caller's to choose. So tenants share the budget evenly, and a tenant's workloads of a few
questions are one arm together: names alone do not draw the bonus of what was never tried.

Pure: records in, a plan out. Owns no runs (`serve.stages.practice`).
"""

from __future__ import annotations

import math
import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from statistics import fmean

from pydantic import BaseModel

Arm = tuple[str, str]
"""(tenant, workload)."""

TEMPERATURE = 0.1
CARRIED = 0.3
"""What of an arm's value is kept when the next generation's tries are in (SEC's 1 - alpha; the paper names none)."""

MIN_MOVED = 4
"""Tries by each of two generations before their difference counts as a move."""

MIN_QUESTIONS = 4
"""Fewer than these make no arm of their own."""


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
    """Why a workload got its share; of a small one, `advantage`, `moved` and `score` are those of all small ones."""

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
    """One arm, or a tenant's small ones together."""

    tries: list[Try] = field(default_factory=list[Try])
    tasks: list[Choice] = field(default_factory=list[Choice])
    drawn: int = 0

    @cached_property
    def advantage(self) -> float:
        return _advantage(self.tries)

    @cached_property
    def moved(self) -> float:
        return _moved(self.tries)

    def score(self, total: int, samples: int) -> float:
        """What the softmax goes by, when there are `total` tries of all that competes with it."""
        return self.advantage + self.moved + _bonus(total, len(self.tries) + samples * self.drawn)


def plan(choices: Iterable[Choice], history: Iterable[Try], *, budget: int, samples: int, seed: int) -> Plan:
    """`budget` tasks (all, when there are fewer) for `samples` tries each; the same arguments give the same plan.

    `history` in the order in which it happened. A question is chosen once, however often it was asked. The tenant with
    the fewest tasks tonight is next, of several the one that was tried the least before.
    """
    distinct = {(choice.arm, choice.question): choice for choice in sorted(choices, key=lambda c: c.task_id)}
    offered = [distinct[key] for key in sorted(distinct)]
    questions = Counter(choice.arm for choice in offered)
    standings: defaultdict[Arm, _Standing] = defaultdict(_Standing)
    standing_of = {arm: standings[arm if count >= MIN_QUESTIONS else (arm[0], "")] for arm, count in questions.items()}
    own: defaultdict[Arm, list[bool]] = defaultdict(list)
    by_question: defaultdict[tuple[Arm, str], list[bool]] = defaultdict(list)
    for choice in offered:
        standing_of[choice.arm].tasks.append(choice)
    for one in history:
        if one.arm in standing_of:
            standing_of[one.arm].tries.append(one)
            own[one.arm].append(one.success)
            by_question[one.arm, one.question].append(one.success)
    competing = {tenant: [s for arm, s in standings.items() if arm[0] == tenant] for tenant, _ in standings}
    tried = {tenant: sum(len(standing.tries) for standing in found) for tenant, found in competing.items()}
    begun = {arm: standing_of[arm].score(tried[arm[0]], samples) for arm in questions}
    dice, chosen = random.Random(seed), list[Choice]()
    # Those who were seldom tried come first: where the budget is too small for all, they take turns over the nights.
    order = sorted(dice.sample(sorted(competing), len(competing)), key=lambda tenant: tried[tenant])
    drawn = dict.fromkeys(order, 0)
    while len(chosen) < budget and len(chosen) < len(offered):
        tenant = min((t for t in drawn if any(s.tasks for s in competing[t])), key=lambda t: drawn[t])
        open_arms = [standing for standing in competing[tenant] if standing.tasks]
        done = tried[tenant] + samples * drawn[tenant]
        standing = dice.choices(open_arms, _softmax([s.score(done, samples) for s in open_arms]))[0]
        mean = _smoothed([one.success for one in standing.tries])
        weights = [_worth(by_question[task.arm, task.question], mean) for task in standing.tasks]
        task = dice.choices(standing.tasks, weights)[0]
        standing.tasks.remove(task)
        standing.drawn += 1
        drawn[tenant] += 1
        chosen.append(task)
    shares = Counter(choice.arm for choice in chosen)
    figures = [
        ArmFigures(
            tenant=arm[0],
            workload=arm[1],
            tasks=count,
            tries=len(own[arm]),
            success=round(_smoothed(own[arm]), 4),
            advantage=round(standing_of[arm].advantage, 4),
            moved=round(standing_of[arm].moved, 4),
            score=round(begun[arm], 4),
            chosen=shares[arm],
        )
        for arm, count in questions.items()
    ]
    return Plan([choice.task_id for choice in chosen], figures)


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
