"""Live outcomes of two generations side by side: what counts, like compared with like, and the watch's word.

Owns the rules of what may roll a generation back. Owns no reading of outcomes and no rollback (`serve.watching`).

- Each workload of each tenant is compared by itself (`evals.watch`): a change in the mix of work is no change in the
  model. With k of them compared, each must be proven at (1 - level) / k(k+1): all together then cry wolf no more
  often than one may, however many there come to be.
- The same question asked again is one outcome of a generation: repeats are not independent.
- A verifier's word holds before a user's. A user's scores count up to a cap, which is lower than the number that a
  verdict needs: nobody rolls back alone. The operator's are not capped.
- A tenant supplies its own tasks and references: where others have outcomes to compare, they must point the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

from evals.watch import Tally, WatchVerdict, watch

if TYPE_CHECKING:
    from memory.outcomes import LiveRun, LiveScore


class WatchConfig(BaseModel):
    """When live outcomes undo a promotion."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    enabled: bool = Field(default=True, description="roll a generation back that is proven worse in use")
    level: float = Field(default=0.95, ge=0.5, lt=1, description="how sure it must be")
    min_outcomes: int = Field(
        default=20, ge=1, description="judged runs of a workload, of each generation, before it is compared"
    )
    max_outcomes: int = Field(
        default=1000, ge=1, description="after so many of the new generation in a workload its standing is settled"
    )
    max_per_author: int = Field(
        default=10, ge=0, description="scores of one author that count, in a workload; under min_outcomes"
    )
    history: int = Field(default=5000, ge=1, description="served runs, the newest, that are looked at")
    every_s: float = Field(default=0.25, gt=0, le=1, description="seconds between looks")
    canary: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="share of users that a night's generation gets first; 0 = all at once",
    )
    canary_outcomes: int = Field(
        default=100, ge=1, description="judged runs in canary, with no proof against it, after which it serves all"
    )

    @model_validator(mode="after")
    def _no_author_is_enough(self) -> WatchConfig:
        if self.max_per_author >= self.min_outcomes:
            raise ValueError("max_per_author must be less than min_outcomes, or one author could roll back alone")
        return self


@dataclass(frozen=True)
class Workload:
    """A kind of work as both generations did it."""

    tenant: str
    name: str
    old: Tally
    new: Tally
    verdict: WatchVerdict | None = None
    """None: too little to compare."""


@dataclass(frozen=True)
class LiveVerdict:
    """What live outcomes say of the new generation."""

    worse: bool
    told: str
    evidence: dict[str, Any]
    """For the log: the counts and how sure they make it."""
    compared: int
    """Judged runs of the new generation that there is something to compare with."""
    workloads: list[Workload]


def judge(
    runs: Iterable[LiveRun],
    scores: Iterable[LiveScore],
    *,
    old: int,
    new: int,
    since: datetime,
    config: WatchConfig,
) -> LiveVerdict:
    """Whether generation `new` is worse than `old` by what was said of its runs that began at `since` or later."""
    workloads = _workloads(list(runs), list(scores), old, new, since, config)
    ready = [w for w in workloads if min(w.old.n, w.new.n) >= config.min_outcomes]
    level = 1 - (1 - config.level) / (len(ready) * (len(ready) + 1)) if ready else config.level
    judged = [Workload(w.tenant, w.name, w.old, w.new, watch(w.old, w.new, level)) for w in ready]
    compared = sum(w.new.n for w in ready)
    rest = [w for w in workloads if w not in ready]
    proven = [w for w in judged if w.verdict is not None and w.verdict.worse]
    against = next((w for w in proven if _others_agree(w, judged)), None)
    if against is None:
        told = f"not proven worse: {len(judged)} workloads compared, {compared} judged runs of generation {new}"
        if proven:
            told += "; worse only in what one tenant asks, while the others see nothing of it"
        return LiveVerdict(False, told, {}, compared, [*judged, *rest])
    assert against.verdict is not None
    evidence = {
        "workload": against.name,
        "tenant": against.tenant,
        "confidence": config.level,
        "workloads_compared": len(judged),
        **against.verdict.model_dump(mode="json", exclude={"worse", "told"}),
    }
    told = f"workload {against.name!r}: {against.verdict.told}"
    return LiveVerdict(True, told, evidence, compared, [*judged, *rest])


def _workloads(
    runs: Sequence[LiveRun],
    scores: Sequence[LiveScore],
    old: int,
    new: int,
    since: datetime,
    config: WatchConfig,
) -> list[Workload]:
    counts: dict[tuple[str, str], dict[int, list[bool]]] = {}
    asked: set[tuple[int, str, str, str]] = set()
    by_author: Counter[tuple[int, str, str, str]] = Counter()

    def count(run: LiveRun, success: bool, author: str | None = None) -> None:
        if run.generation not in (old, new) or (run.generation == new and run.started_at < since):
            return
        place = (run.generation, run.tenant, run.workload)
        seen = counts.setdefault((run.tenant, run.workload), {old: [], new: []})[run.generation]
        full = run.generation == new and len(seen) >= config.max_outcomes
        capped = author is not None and by_author[(*place, author)] >= config.max_per_author
        if (*place, run.fingerprint) in asked or full or capped:
            return
        asked.add((*place, run.fingerprint))
        if author is not None:
            by_author[(*place, author)] += 1
        seen.append(success)

    for run in runs:
        if run.verified is not None:
            count(run, run.verified)
    # Of several words on a run the last one holds, the operator's before all others.
    last: dict[str, LiveScore] = {}
    for score in scores:
        if score.operator or score.run.id not in last or not last[score.run.id].operator:
            last[score.run.id] = score
    for score in last.values():
        if score.run.verified is None:
            count(score.run, score.success, None if score.operator else score.voice)
    return [Workload(tenant, name, _tally(found[old]), _tally(found[new])) for (tenant, name), found in counts.items()]


def _tally(outcomes: list[bool]) -> Tally:
    return Tally(n=len(outcomes), successes=sum(outcomes))


def _others_agree(proven: Workload, judged: Sequence[Workload]) -> bool:
    """Whether the other tenants' outcomes point the same way; those who have too few to compare are no objection.

    On average over their workloads: the mean of e-values is one itself (Vovk & Wang, arXiv 1912.06116), so the more
    there are, the more one that looks worse by chance must show before it vouches for the whole.
    """
    others = [w.verdict.evidence for w in judged if w.tenant != proven.tenant and w.verdict is not None]
    return not others or sum(others) / len(others) > 1
