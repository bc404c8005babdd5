"""Batches: a line's result and its run are one transaction, states move one way, counts are true."""

from __future__ import annotations

import pytest

from memory import batches
from memory.batches import Batch, BatchError, BatchStatus, Line, LineResult, LineStatus
from memory.errors import ConflictError, NotFoundError
from memory.files import FilePurpose, StoredFile
from memory.ledger import Ledger
from tests.memory.samples import task, trajectory


def batch_in(ledger: Ledger, tenant: str = "default") -> Batch:
    made = Batch(tenant=tenant, caller="ann", endpoint="/v1/chat/completions", input_file_id="file-1")
    batches.add(ledger.database, made)
    return made


def running(ledger: Ledger, n: int = 3) -> Batch:
    made = batch_in(ledger)
    batches.add_lines(ledger.database, made.id, [Line(i, f"r{i}", "{}") for i in range(1, n + 1)])
    return batches.advance(ledger.database, made.id, BatchStatus.IN_PROGRESS)


def pending(ledger: Ledger, batch: Batch) -> list[int]:
    return [line.number for line in batches.lines(ledger.database, batch.id, LineStatus.PENDING)]


def test_a_lines_result_comes_with_its_run_or_not_at_all(ledger: Ledger) -> None:
    batch = running(ledger)
    good, stranger = task(), task("another")
    run = trajectory(good)
    torn = trajectory(stranger).model_copy(update={"task_id": "task_x"})
    results = [
        LineResult(1, LineStatus.COMPLETED, "one", (good, run)),
        LineResult(2, LineStatus.COMPLETED, "two", (stranger, torn)),
        LineResult(3, LineStatus.FAILED, "three"),
    ]
    refused = batches.finish_lines(ledger.database, batch.id, results)
    assert [result.number for result, _ in refused] == [2]
    assert pending(ledger, batch) == [2]
    assert [t.id for t in ledger.trajectories()] == [run.id]
    now = batches.get(ledger.database, batch.id)
    assert (now.total, now.completed, now.failed) == (3, 1, 1)


def test_a_finished_line_keeps_its_first_result(ledger: Ledger) -> None:
    batch = running(ledger)
    good = task()
    first = LineResult(1, LineStatus.COMPLETED, "first", (good, trajectory(good)))
    again = LineResult(1, LineStatus.COMPLETED, "second", (good, trajectory(good)))
    assert batches.finish_lines(ledger.database, batch.id, [first]) == []
    assert batches.finish_lines(ledger.database, batch.id, [again]) == []
    (line,) = batches.lines(ledger.database, batch.id, LineStatus.COMPLETED)
    assert line.result == "first"
    assert len(ledger.trajectories()) == 1


def test_lines_stored_twice_are_there_once_and_a_used_custom_id_is_named(ledger: Ledger) -> None:
    batch = batch_in(ledger)
    lines = [Line(i, f"r{i}", "{}") for i in range(1, 1203)]
    assert batches.add_lines(ledger.database, batch.id, lines[:700]) == []
    assert batches.add_lines(ledger.database, batch.id, lines) == []
    doubled = Line(1203, "r1", "{}")
    assert batches.add_lines(ledger.database, batch.id, [doubled]) == [doubled]
    assert batches.get(ledger.database, batch.id).total == 1202
    every = [line.number for line in batches.every_line(ledger.database, batch.id, LineStatus.PENDING)]
    assert every == list(range(1, 1203))


@pytest.mark.parametrize(
    ("path", "to"),
    [
        ([], BatchStatus.COMPLETED),
        ([BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING], BatchStatus.CANCELLING),
        ([BatchStatus.IN_PROGRESS, BatchStatus.FINALIZING, BatchStatus.COMPLETED], BatchStatus.IN_PROGRESS),
    ],
)
def test_an_illegal_move_is_refused(sqlite_ledger: Ledger, path: list[BatchStatus], to: BatchStatus) -> None:
    batch = batch_in(sqlite_ledger)
    for step in path:
        batches.advance(sqlite_ledger.database, batch.id, step)
    with pytest.raises(ConflictError, match="cannot become"):
        batches.advance(sqlite_ledger.database, batch.id, to)


def test_a_batch_ends_once_with_its_files_and_counts(ledger: Ledger) -> None:
    batch = running(ledger, 2)
    batches.finish_lines(ledger.database, batch.id, [LineResult(1, LineStatus.COMPLETED, "one")])
    batches.advance(ledger.database, batch.id, BatchStatus.FINALIZING)
    output = StoredFile(
        id="file-out", tenant="default", purpose=FilePurpose.BATCH_OUTPUT, filename="o", bytes=1, sha256="x"
    )
    ended = batches.finish(ledger.database, batch.id, BatchStatus.EXPIRED, [output], output_file_id=output.id)
    assert (ended.status, ended.completed, ended.total) == (BatchStatus.EXPIRED, 1, 2)
    assert ended.expired_at is not None
    assert batches.finish(ledger.database, batch.id, BatchStatus.COMPLETED, []) == ended
    assert batches.fail(ledger.database, batch.id, []) == ended
    assert batches.unfinished(ledger.database) == []


def test_a_batch_that_never_ran_fails_without_its_lines(ledger: Ledger) -> None:
    batch = batch_in(ledger)
    batches.add_lines(ledger.database, batch.id, [Line(1, "r1", "{}")])
    error = BatchError(code="invalid_json_line", message="bad", line=2)
    failed = batches.fail(ledger.database, batch.id, [error])
    assert (failed.status, failed.errors, failed.total) == (BatchStatus.FAILED, [error], 0)
    assert pending(ledger, batch) == []


def test_another_tenants_batch_is_not_found(ledger: Ledger) -> None:
    mine, theirs = batch_in(ledger), batch_in(ledger, "other")
    assert [b.id for b in batches.page(ledger.database, tenant="default")[0]] == [mine.id]
    with pytest.raises(NotFoundError):
        batches.get(ledger.database, theirs.id, tenant="default")
