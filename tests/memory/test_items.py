"""Memory items: use, status, origins, outbox, on both databases."""

from __future__ import annotations

import pytest

from memory.errors import ConflictError, NotFoundError
from memory.ledger import Ledger
from memory.records import MEMORY_TRANSITIONS, MemoryKind, MemoryStatus
from tests.memory import samples


def test_items_come_back_as_they_went_in_and_by_filter(ledger: Ledger):
    of = samples.task()
    mine, theirs, run = samples.principle(), samples.principle(tenant="ada"), samples.past_run(of)
    ledger.add_principle(mine)
    ledger.add_principle(theirs)
    ledger.add_past_run(run)
    assert ledger.get_principle(mine.id) == mine
    assert ledger.get_past_run(run.id) == run
    assert ledger.principles() == [mine, theirs]
    assert ledger.principles(tenant="ada", status=MemoryStatus.ACTIVE) == [theirs]
    assert ledger.past_runs(status=MemoryStatus.RETIRED) == []
    with pytest.raises(NotFoundError):
        ledger.get_principle(run.id)


def test_a_use_is_counted_once_per_key(ledger: Ledger):
    item = samples.principle()
    ledger.add_principle(item)
    ledger.credit_use(item.id, True, "traj_1")
    ledger.credit_use(item.id, True, "traj_1")
    ledger.credit_use(item.id, False, "traj_2")
    counted = ledger.get_principle(item.id)
    assert (counted.uses, counted.successes, counted.score) == (2, 1, 0.5)
    with pytest.raises(NotFoundError):
        ledger.credit_use("prin_x", True, "traj_1")


def test_adding_again_after_use_changes_nothing(ledger: Ledger):
    item = samples.principle()
    ledger.add_principle(item)
    ledger.credit_use(item.id, True, "traj_1")
    ledger.add_principle(item)
    assert ledger.get_principle(item.id).uses == 1
    assert len(ledger.outbox(10)) == 1


@pytest.mark.parametrize("start", list(MemoryStatus))
@pytest.mark.parametrize("to", list(MemoryStatus))
def test_only_legal_moves_of_status_are_made(sqlite_ledger: Ledger, start: MemoryStatus, to: MemoryStatus):
    item = samples.principle().model_copy(update={"status": start})
    sqlite_ledger.add_principle(item)
    if to is start or to in MEMORY_TRANSITIONS[start]:
        sqlite_ledger.set_memory_status(item.id, to, "why not")
        assert sqlite_ledger.get_principle(item.id).status is to
    else:
        with pytest.raises(ConflictError, match="cannot become"):
            sqlite_ledger.set_memory_status(item.id, to, "why not")
        assert sqlite_ledger.get_principle(item.id).status is start


def test_every_change_of_what_is_recallable_is_in_the_outbox_in_order(ledger: Ledger):
    assert ledger.memory_watermark() == ""
    item, run = samples.principle(), samples.past_run(samples.task())
    ledger.add_principle(item)
    ledger.add_past_run(run)
    ledger.set_memory_status(item.id, MemoryStatus.RETIRED, "it misled")
    ledger.set_memory_status(item.id, MemoryStatus.RETIRED, "it misled")
    changes = ledger.outbox(10)
    assert [(c.item_id, c.kind, c.op) for c in changes] == [
        (item.id, MemoryKind.PRINCIPLE, "upsert"),
        (run.id, MemoryKind.RUN, "upsert"),
        (item.id, MemoryKind.PRINCIPLE, "delete"),
    ]
    assert ledger.outbox(1) == changes[:1]
    ledger.ack_outbox(changes[1].seq)
    assert ledger.outbox(10) == changes[2:]
    ledger.ack_outbox(changes[2].seq)
    assert ledger.outbox(10) == []
    assert ledger.memory_watermark() == str(changes[2].seq)


def test_a_refused_item_leaves_no_outbox_row(ledger: Ledger):
    item = samples.principle()
    ledger.add_principle(item)
    with pytest.raises(ConflictError):
        ledger.add_principle(item.model_copy(update={"text": "Something else."}))
    ledger.set_memory_status(item.id, MemoryStatus.MERGED, "said twice")
    with pytest.raises(ConflictError):
        ledger.set_memory_status(item.id, MemoryStatus.ACTIVE, "unsaid")
    assert [change.op for change in ledger.outbox(10)] == ["upsert", "delete"]


def test_an_item_of_one_tenant_may_not_be_made_from_another_tenants_run(ledger: Ledger):
    task = samples.task(tenant="ada")
    run = samples.trajectory(task)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    with pytest.raises(ConflictError, match="another's run"):
        ledger.add_principle(samples.principle(tenant="bob", sources=[run.id]))
    assert ledger.principles() == []


def test_candidates_are_the_tenants_active_items_of_that_kind(ledger: Ledger):
    task = samples.task()
    run = samples.trajectory(task)
    ledger.add_task(task)
    ledger.add_trajectory(run)
    learned = samples.principle(sources=[run.id])
    retired, theirs, repeat = samples.principle("Old."), samples.principle(tenant="ada"), samples.past_run(task)
    for item in (learned, retired, theirs):
        ledger.add_principle(item)
    ledger.add_past_run(repeat)
    ledger.set_memory_status(retired.id, MemoryStatus.RETIRED, "old")
    ids = [learned.id, retired.id, theirs.id, repeat.id, "prin_x"]
    found = ledger.candidates(MemoryKind.PRINCIPLE, "default", ids)
    assert list(found) == [learned.id]
    assert found[learned.id].item == learned
    assert found[learned.id].origins == {task.id, task.fingerprint}
