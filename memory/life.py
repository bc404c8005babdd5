"""The life of a memory item after it was added: when it retires, leaves the prompt and comes back.

Decisions are pure functions of counts; `review` applies them to a tenant's items, one transaction for all.
Owns no counting (`memory.uses`), no merging (`memory.items.merge`) and no ranking (`memory.recall`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy import select

from memory import items, rows, uses
from memory.database import Database
from memory.items import RECALLABLE, Item
from memory.records import MemoryStatus, Principle
from memory.schema import items as items_table
from memory.schema import outbox
from memory.uplift import Count, Exposure, uplift


class LifeConfig(BaseModel):
    """When items merge, retire and are internalised."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    merge_similarity: float = Field(default=0.85, ge=-1.0, le=1.0)
    """Cosine from which a new principle may say the same as an old one, and a model is asked (EvolveR)."""
    merge_neighbours: int = Field(default=3, ge=0)
    """Of how many of the nearest a model is asked; 0 merges nothing."""
    retire_below: float = Field(default=0.3, ge=0.0, le=1.0)
    """Score under which a principle retires (EvolveR)."""
    min_uses: int = Field(default=5, ge=0)
    """Uses before a low score counts: EvolveR's two failures in a row are bad luck as often as a bad principle."""
    min_runs: int = Field(default=10, ge=1)
    """Judged runs of one generation with an item and without it, each, before it is internalised or returns."""
    floor: float = Field(default=0.8, ge=0.0, le=1.0)
    """Success rate, with and without, that an internalised item's tasks need."""
    margin: float = Field(default=0.05, ge=0.0, le=1.0)
    """How much worse runs without it may do; twice that before it returns, so that it does not flicker."""


@dataclass(frozen=True)
class Move:
    """One item's change of status."""

    item_id: str
    status: MemoryStatus
    why: str


def internalised(with_it: Count, without: Count, rule: LifeConfig, *, is_now: bool) -> bool:
    """Whether an item belongs out of the prompt: runs without it succeed as well as runs with it.

    `without` are runs of the current generation, `with_it` of the newest that was shown the item. Too few
    runs leave it where it is (`is_now`).
    """
    shown, missing = with_it.rate, without.rate
    if shown is None or missing is None or min(with_it.n, without.n) < rule.min_runs:
        return is_now
    slack = rule.margin if is_now else 0.0
    return min(shown, missing) >= rule.floor - slack and missing >= shown - rule.margin - slack


def verdict(
    item: Item, by_generation: Mapping[int | None, Exposure], generation: int, rule: LifeConfig
) -> tuple[MemoryStatus, str] | None:
    """Where an item goes now, and why; None when it stays. A pinned one always does.

    Retired: a principle by its score, unless it provably helps on hard tasks; any item that provably hurts.
    """
    if item.pinned or item.status not in RECALLABLE:
        return None
    active = item.status is MemoryStatus.ACTIVE
    measured = uplift(sum(by_generation.values(), Exposure())) if active else None
    if measured is not None and measured.high < 0:
        return MemoryStatus.RETIRED, f"it hurts: uplift {measured.value:+.2f}, at most {measured.high:+.2f}"
    helps = measured is not None and measured.low > 0
    low = isinstance(item, Principle) and item.score < rule.retire_below and item.uses >= rule.min_uses
    if active and low and not helps:
        return MemoryStatus.RETIRED, f"score {item.score:.2f} after {item.uses} uses"
    now = by_generation.get(generation, Exposure())
    seen = [number for number, e in by_generation.items() if number is not None and e.shown.n >= rule.min_runs]
    with_it = now.shown if active else by_generation[max(seen)].shown if seen else Count()
    belongs_out = internalised(with_it, now.withheld, rule, is_now=not active)
    if belongs_out is not active:
        return None
    figures = f"generation {generation}: {now.withheld.successes} of {now.withheld.n} without it"
    figures += f", {with_it.successes} of {with_it.n} with it"
    return (MemoryStatus.INTERNALISED if active else MemoryStatus.ACTIVE), figures


def review(database: Database, generation: int, rule: LifeConfig, *, tenant: str) -> list[Move]:
    """Apply `verdict` to a tenant's items under the current generation; returns what moved."""
    query = select(items_table.c.kind, items_table.c.body)
    query = query.where(items_table.c.tenant == tenant, items_table.c.status.in_(RECALLABLE))
    moves: list[Move] = []
    with database.writing() as connection:
        standing: list[Item] = [rows.load(items.MODELS[row.kind], row.body) for row in connection.execute(query)]
        measured = uses.exposures(connection, [item.id for item in standing])
        for item in standing:
            decided = verdict(item, measured.get(item.id, {}), generation, rule)
            if decided is not None:
                items.set_status(connection, item.id, *decided)
                moves.append(Move(item.id, *decided))
    return moves


def bring_back(database: Database, since: datetime, why: str) -> list[str]:
    """Show again what all tenants' prompts did without since then; returns the ids."""
    changed = select(outbox.c.item_id).where(outbox.c.at >= int(since.timestamp()))
    left = items_table.c.status == MemoryStatus.INTERNALISED, items_table.c.id.in_(changed)
    with database.writing() as connection:
        ids = list(connection.execute(select(items_table.c.id).where(*left)).scalars())
        for item_id in ids:
            items.set_status(connection, item_id, MemoryStatus.ACTIVE, why)
    return ids
