"""What a night does to memory: credits what was shown and withheld, merges new principles, reviews all items.

Everything is idempotent: a stage that dies is simply run again.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Iterable

from distill.equivalence import first_equivalent
from distill.principles import Ask
from distill.snapshot import outcome_of
from memory import items, life, uses
from memory.errors import NotFoundError
from memory.index import drain
from memory.records import Feedback, MemoryStatus, Principle, Trajectory
from serve.wiring import Services


def credit_runs(services: Services, trajectories: Iterable[Trajectory], feedback: Iterable[Feedback]) -> int:
    """Count every judged run for the items that it was shown, and as a control for those withheld from it.

    Returns how many counts are new or changed: a run that users judged later, or otherwise, is counted anew.
    """
    said: defaultdict[str, list[Feedback]] = defaultdict(list)
    for word in feedback:
        said[word.trajectory_id].append(word)
    by_tenant: defaultdict[str, list[uses.Use]] = defaultdict(list)
    for run in trajectories:
        outcome = outcome_of(run, said[run.id]) if run.recalled else None
        if outcome is not None:
            by_tenant[run.tenant] += [
                uses.Use(item.id, run.id, outcome.success, item.withheld, run.generation) for item in run.recalled
            ]
    changed = 0
    for tenant, counted in by_tenant.items():
        with services.ledger.database.writing() as connection:
            changed += uses.count(connection, counted, tenant=tenant)
    return changed


async def keep_principles(services: Services, principles: Iterable[Principle], judge: Ask) -> dict[str, int]:
    """Add new principles; one that says the same as a known one, in a model's judgement, is merged into it.

    One after the other, so that two of the same night find each other. Returns counts of `added` and `merged`.
    """
    counts = {"added": 0, "merged": 0}
    for principle in principles:
        near = await asyncio.to_thread(_add, services, principle)
        if near is None:
            continue
        counts["added"] += 1
        same = await first_equivalent(judge, principle, near)
        if same is not None:
            await asyncio.to_thread(_merge, services, same.id, principle.id)
            counts["merged"] += 1
    return counts


def _add(services: Services, principle: Principle) -> list[Principle] | None:
    """Add a principle and return its neighbours; None when it was put away or reworded since it was first added."""
    rule, ledger = services.settings.life, services.ledger
    try:
        known = ledger.get_principle(principle.id)
    except NotFoundError:
        ledger.add_principle(principle)
    else:
        # Added before a crash, and perhaps not compared yet. Ids come from the first wording: one that somebody
        # reworded since is theirs, and the model's old sentence must not have it merged away.
        if known.status is not MemoryStatus.ACTIVE or known.text != principle.text:
            return None
    drain(ledger, services.index)
    return services.memory.neighbours(principle, at_least=rule.merge_similarity, k=rule.merge_neighbours)


def _merge(services: Services, winner_id: str, loser_id: str) -> None:
    with services.ledger.database.writing() as connection:
        items.merge(connection, winner_id, loser_id, "a model says that both give the same advice")


def review_items(services: Services, generation: int) -> dict[str, int]:
    """Retire, internalise and bring back items of all tenants; status -> how many took it on."""
    moved: Counter[str] = Counter()
    for tenant in items.tenants(services.ledger.database):
        moves = life.review(services.ledger.database, generation, services.settings.life, tenant=tenant)
        moved.update(move.status.value for move in moves)
    drain(services.ledger, services.index)
    return dict(moved)
