"""What memory did for one run, read afterwards: every recalled item with the figures that chose it and what came of it.

Reads only. Owns neither the choice (`memory.recall`) nor the counting (`memory.uses`).
"""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import select

from memory import items, rows, uses
from memory.database import Database
from memory.items import Item
from memory.records import MemoryKind, Recalled, Trajectory
from memory.schema import item_uses, trajectories
from memory.schema import items as items_table
from memory.uplift import Exposure, Uplift, uplift


@dataclass(frozen=True)
class Recollection:
    """One recalled item of a run.

    `item`: as it stands today, None once forgotten. `success`: how the run ended, as it was counted for the item; None
    while no night has counted it. `exposure` and `uplift`: over all runs so far.
    """

    recalled: Recalled
    item: Item | None
    success: bool | None
    exposure: Exposure
    uplift: Uplift | None

    @property
    def helps(self) -> bool | None:
        """Whether runs with the item do better (True) or worse (False) than those without; None: nobody can tell."""
        if self.uplift is None or self.uplift.low <= 0 <= self.uplift.high:
            return None
        return self.uplift.low > 0


def of_run(database: Database, run_id: str, *, tenant: str) -> tuple[Trajectory, list[Recollection]]:
    """The tenant's run and what memory put into its prompt or withheld, best first. NotFoundError."""
    with database.reading() as connection:
        run = rows.find(connection, trajectories, Trajectory, "trajectory", {"id": run_id, "tenant": tenant})
        ids = [recalled.id for recalled in run.recalled]
        mine = items_table.c.id.in_(ids), items_table.c.tenant == tenant
        known: dict[str, Item] = {
            row.id: rows.load(items.MODELS[MemoryKind(row.kind)], row.body)
            for row in connection.execute(select(items_table.c.id, items_table.c.kind, items_table.c.body).where(*mine))
        }
        # What was merged since is counted for the item that took it over.
        counted = {id: known[id].merged_into or id for id in known}
        c = item_uses.c
        query = select(c.item_id, c.success).where(c.item_id.in_(counted.values()), c.use_key == run_id)
        success = {row.item_id: row.success for row in connection.execute(query)}
        measured = uses.exposures(connection, list(known))
    found: list[Recollection] = []
    for recalled in run.recalled:
        exposure = sum(measured.get(recalled.id, {}).values(), Exposure())
        won = success.get(counted.get(recalled.id, ""))
        found.append(Recollection(recalled, known.get(recalled.id), won, exposure, uplift(exposure)))
    return run, found
