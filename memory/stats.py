"""Figures of a tenant's memory: what each item is worth, and what prompts cost from generation to generation.

Reads only. Owns no arithmetic of uplift (`memory.uplift`).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass

from sqlalchemy import func, select

from memory import items, rows, uses
from memory.database import Database
from memory.items import Item
from memory.records import MemoryKind, MemoryStatus, Purpose
from memory.schema import items as items_table
from memory.schema import trajectories
from memory.uplift import Exposure, Uplift, uplift

NEWEST = 20_000
"""Runs that the prompts' means are taken over, the newest ones."""


@dataclass(frozen=True)
class Worth:
    """An item with its judged runs and what they say; `uplift` is None until both kinds of runs were seen."""

    item: Item
    exposure: Exposure
    uplift: Uplift | None


@dataclass(frozen=True)
class PromptCost:
    """What the runs of a generation spent on prompts."""

    generation: int
    runs: int
    prompt_tokens: float
    """Mean prompt tokens of a run, all its model calls together."""
    recalled: float
    """Mean number of items shown to a run."""


def worths(
    database: Database, *, tenant: str, kind: MemoryKind | None = None, workload: str | None = None
) -> list[Worth]:
    """The tenant's items that were ever shown or withheld in a judged run, the most useful first.

    Items that were merged are left out: the one that took them over has their runs.
    """
    table = items_table
    query = select(table.c.kind, table.c.body).where(table.c.tenant == tenant, table.c.status != MemoryStatus.MERGED)
    if kind is not None:
        query = query.where(table.c.kind == kind)
    with database.reading() as connection:
        every: list[Item] = [rows.load(items.MODELS[MemoryKind(r.kind)], r.body) for r in connection.execute(query)]
        found = [item for item in every if workload in (None, item.workload)]
        measured = uses.exposures(connection, [item.id for item in found])
    table_rows: list[Worth] = []
    for item in found:
        if item.id in measured:
            exposure = sum(measured[item.id].values(), Exposure())
            table_rows.append(Worth(item, exposure, uplift(exposure)))
    return sorted(table_rows, key=lambda w: (w.uplift is None, -(w.uplift.value if w.uplift else 0.0), w.item.id))


def counts(
    database: Database, *, tenant: str | None, workload: str | None = None
) -> dict[tuple[MemoryKind, MemoryStatus], int]:
    """How many items of the tenant there are of each kind and status; None = all tenants'."""
    c = items_table.c
    mine = [c.tenant == tenant] if tenant is not None else []
    with database.reading() as connection:
        if workload is None:
            query = select(c.kind, c.status, func.count()).where(*mine).group_by(c.kind, c.status)
            return {(MemoryKind(kind), MemoryStatus(status)): n for kind, status, n in connection.execute(query)}
        # A workload is inside the record.
        bodies = connection.execute(select(c.kind, c.status, c.body).where(*mine).execution_options(yield_per=500))
        return dict(
            Counter(
                (MemoryKind(row.kind), MemoryStatus(row.status))
                for row in bodies
                if json.loads(row.body)["workload"] == workload
            )
        )


def prompt_costs(database: Database, *, tenant: str, workload: str | None = None) -> list[PromptCost]:
    """Per generation, what the tenant's served runs spent on prompts; runs of unknown cost are left out."""
    c = trajectories.c
    mine = [c.tenant == tenant, c.purpose == Purpose.SERVE, *([c.workload == workload] if workload is not None else [])]
    query = select(c.body).where(*mine).order_by(c.seq.desc()).limit(NEWEST)
    spent: dict[int, list[tuple[int, int]]] = {}
    with database.reading() as connection:
        for body in connection.execute(query).scalars():
            # Whole records, with their token ids, would take minutes to check.
            run = json.loads(body)
            steps = [step["prompt_tokens"] for step in run["steps"][run.get("inherited_steps", 0) :]]
            if steps and None not in steps:
                shown = sum(not item.get("withheld", False) for item in run["recalled"])
                spent.setdefault(run["generation"], []).append((sum(steps), shown))
    return [
        PromptCost(
            generation=generation,
            runs=len(found),
            prompt_tokens=sum(tokens for tokens, _ in found) / len(found),
            recalled=sum(shown for _, shown in found) / len(found),
        )
        for generation, found in sorted(spent.items())
    ]
