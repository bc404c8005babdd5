"""A batch as a durable workflow: read the file, run the lines, write the output.

Each stage starts from what the ledger holds, so a killed one is simply run again: lines that are stored are not
stored twice, lines that have a result are not run twice, and a batch ends once.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import TypeVar
from weakref import WeakKeyDictionary

from dbos import DBOS, SetWorkflowID

from memory import batches
from memory.batches import Batch, BatchError, BatchStatus, Line, LineResult, LineStatus, line_key
from memory.errors import ConflictError, LedgerError, NotFoundError
from memory.files import Draft, FilePurpose, StoredFile
from memory.records import new_id
from serve import durable
from serve.api.errors import describe
from serve.api.runs import Turnstile
from serve.batch_lines import PASSING, LineCall, failed_line, read_lines, run_line, unrun_line
from serve.settings import ServerConfig
from serve.wiring import Services

log = logging.getLogger(__name__)
T = TypeVar("T")

MAX_ERRORS = 100
FEED = 200
"""Pending lines read from the ledger at once."""

PAGE_BYTES = 8_000_000
"""Requests stored in one transaction, by size; by number it is `batches.PAGE`."""

GROUP = 256
FLUSH_S = 0.005
"""How long a result waits for company: each transaction waits for the disk."""

WATCH_S = 0.25
LONGEST_WAIT_S = 30.0

_turnstiles: WeakKeyDictionary[asyncio.AbstractEventLoop, Turnstile] = WeakKeyDictionary()
"""One for all batches of a service, beside the one of its chat."""


def submit(services: Services, batch: Batch) -> None:
    """Commit a batch and begin it."""
    batches.add(services.ledger.database, batch)
    _go(batch.id, batch.id)


def resume(services: Services) -> None:
    """At start: batches that have not ended and that DBOS does not know, or gave up, begin (again)."""
    for batch in batches.unfinished(services.ledger.database):
        status = DBOS.get_workflow_status(batch.id)
        if status is None:
            _go(batch.id, batch.id)
        elif status.status not in ("PENDING", "ENQUEUED"):
            _go(batch.id, new_id(batch.id))


def _go(batch_id: str, workflow_id: str) -> None:
    with SetWorkflowID(workflow_id):
        DBOS.start_workflow(run_batch, batch_id)


@DBOS.workflow(max_recovery_attempts=None)
def run_batch(batch_id: str) -> str:
    """The three stages; a bug in one ends the batch as failed, with what is known."""
    try:
        take_in(batch_id)
        run_lines(batch_id)
        return finalize(batch_id)
    except Exception as exc:
        log.exception("batch %s hit a bug", batch_id)
        return fail(batch_id, f"internal error ({type(exc).__name__}); the service's log has the details")


@DBOS.step()
def take_in(batch_id: str) -> None:
    """Check the file line by line and store its lines. A bad file fails the batch."""
    services, wait = durable.services(), durable.waiter()
    database = services.ledger.database
    batch = _patiently(wait, lambda: batches.get(database, batch_id))
    if batch.status is not BatchStatus.VALIDATING:
        return
    errors: list[BatchError] = []
    page: list[Line] = []
    size = 0

    def store() -> None:
        doubles = _patiently(wait, lambda: batches.add_lines(database, batch_id, page))
        errors.extend(_double(line) for line in doubles)
        page.clear()

    try:
        for found in read_lines(services.settings.files_dir / batch.input_file_id, batch.endpoint):
            wait.check()
            if isinstance(found, BatchError):
                errors.append(found)
            elif not errors:
                page.append(found)
                size += len(found.request)
            if len(page) >= batches.PAGE or size >= PAGE_BYTES:
                store()
                size = 0
            if len(errors) >= MAX_ERRORS:
                break
        store()
    except NotFoundError as exc:
        errors = [BatchError(code="file_not_found", message=str(exc), param="input_file_id")]
    if errors:
        _patiently(wait, lambda: batches.fail(database, batch_id, errors[:MAX_ERRORS]))
        return
    _patiently(wait, lambda: _unless_cancelled(services, batch_id, BatchStatus.IN_PROGRESS))


def _double(line: Line) -> BatchError:
    message = f"custom_id {line.custom_id!r} is used by an earlier line"
    return BatchError(code="duplicate_custom_id", message=message, line=line.number, param="custom_id")


@DBOS.step()
def run_lines(batch_id: str) -> None:
    """Run every pending line, until the batch is cancelled or its time is over."""
    services, wait = durable.services(), durable.waiter()
    batch = _patiently(wait, lambda: batches.get(services.ledger.database, batch_id))
    if batch.status is BatchStatus.IN_PROGRESS:
        wait.on_loop(_run_pending(services, batch))


@DBOS.step()
def finalize(batch_id: str) -> str:
    """Write the output and error files, then end the batch: files' records and status at once."""
    services, wait = durable.services(), durable.waiter()
    database = services.ledger.database
    batch = _patiently(wait, lambda: batches.get(database, batch_id))
    if batch.ended:
        return batch.status.value
    if batch.status is BatchStatus.IN_PROGRESS:
        _patiently(wait, lambda: _unless_cancelled(services, batch_id, BatchStatus.FINALIZING))
        batch = _patiently(wait, lambda: batches.get(database, batch_id))
    unrun = batch.total - batch.completed - batch.failed
    cancelled = batch.status is BatchStatus.CANCELLING
    end = BatchStatus.CANCELLED if cancelled else BatchStatus.EXPIRED if unrun else BatchStatus.COMPLETED
    stored = _patiently(wait, lambda: _write_files(services, batch, cancelled))
    ids = {f"{kind}_file_id": file.id for kind, file in stored.items()}
    done = _patiently(wait, lambda: batches.finish(database, batch_id, end, list(stored.values()), **ids))
    return done.status.value


@DBOS.step()
def fail(batch_id: str, why: str) -> str:
    """End the batch as failed."""
    services, wait = durable.services(), durable.waiter()
    error = BatchError(code="internal_error", message=why)
    return _patiently(wait, lambda: batches.fail(services.ledger.database, batch_id, [error])).status.value


def _unless_cancelled(services: Services, batch_id: str, to: BatchStatus) -> None:
    database = services.ledger.database
    try:
        batches.advance(database, batch_id, to)
    except ConflictError:
        if batches.get(database, batch_id).status is not BatchStatus.CANCELLING:
            raise


def _patiently(wait: durable.Waiter, act: Callable[[], T]) -> T:
    """What `act` returns, tried again for as long as the ledger refuses it (another writer, a full disk)."""
    pause = 0.5
    while True:
        try:
            return act()
        except LedgerError as exc:
            log.warning("a batch waits: %s", exc)
        wait.pause(pause)
        pause = min(2 * pause, LONGEST_WAIT_S)


def _write_files(services: Services, batch: Batch, cancelled: bool) -> dict[str, StoredFile]:
    """The files of a batch that ends, on disk; a kind without lines has none."""
    if batch.in_progress_at is None:
        return {}
    database = services.ledger.database
    code, message = (
        ("batch_cancelled", "This request was not executed before the batch was cancelled.")
        if cancelled
        else ("batch_expired", "This request could not be executed before the completion window expired.")
    )
    every = batches.every_line
    completed = (line.result or "" for line in every(database, batch.id, LineStatus.COMPLETED))
    failed = (line.result or "" for line in every(database, batch.id, LineStatus.FAILED))
    unrun = (unrun_line(batch.id, line, code, message) for line in every(database, batch.id, LineStatus.PENDING))
    written: dict[str, StoredFile] = {}
    for kind, lines in {"output": completed, "error": chain(failed, unrun)}.items():
        stored = _write_file(services, batch, kind, lines)
        if stored is not None:
            written[kind] = stored
    return written


def _write_file(services: Services, batch: Batch, kind: str, lines: Iterable[str]) -> StoredFile | None:
    file_id = f"file-{hashlib.sha256(f'{batch.id}/{kind}'.encode()).hexdigest()[:32]}"
    draft = Draft(services.settings.files_dir, file_id)
    try:
        for line in lines:
            draft.write(f"{line}\n".encode())
        if not draft.bytes:
            return None
        return StoredFile(
            id=file_id,
            tenant=batch.tenant,
            purpose=FilePurpose.BATCH_OUTPUT,
            filename=f"{batch.id}_{kind}.jsonl",
            sha256=draft.seal(),
            bytes=draft.bytes,
        )
    finally:
        draft.discard()


async def _run_pending(services: Services, batch: Batch) -> None:
    """Feed pending lines from the ledger to as many runs as may go on at once; results go to one writer."""
    concurrency = services.settings.batch.concurrency
    halted = asyncio.Event()
    slots = asyncio.Semaphore(concurrency)
    results: asyncio.Queue[tuple[Line, LineResult] | None] = asyncio.Queue(maxsize=2 * GROUP)

    async def one(line: Line) -> None:
        try:
            result = await _settled(services, batch, line, halted)
            if result is not None:
                await results.put((line, result))
        finally:
            slots.release()

    def pending(after: int) -> list[Line]:
        return batches.lines(services.ledger.database, batch.id, LineStatus.PENDING, after=after, limit=FEED)

    async def feed(running: asyncio.TaskGroup) -> None:
        after = 0
        while page := await _asked(partial(pending, after)):
            after = page[-1].number
            for line in page:
                await slots.acquire()
                if halted.is_set():
                    return
                running.create_task(one(line))

    async with asyncio.TaskGroup() as crew:
        crew.create_task(_write_results(services, batch.id, results))
        watch = crew.create_task(_watch(services, batch, halted))
        async with asyncio.TaskGroup() as running:
            await feed(running)
        await results.put(None)
        watch.cancel()


async def _settled(services: Services, batch: Batch, line: Line, halted: asyncio.Event) -> LineResult | None:
    """The line's result; None when the batch was halted while it waited for a part of the service to come back."""
    body = json.loads(line.request)
    call = LineCall(services, _turnstile(services), batch, line_key(batch.id, line.number), body)
    pause = 0.5
    while True:
        try:
            return await run_line(call, line)
        except PASSING as exc:
            log.info("line %d of %s waits: %s", line.number, batch.id, exc)
        try:
            await asyncio.wait_for(halted.wait(), pause)
            return None
        except TimeoutError:
            pause = min(2 * pause, LONGEST_WAIT_S)


async def _write_results(
    services: Services, batch_id: str, results: asyncio.Queue[tuple[Line, LineResult] | None]
) -> None:
    """Commit results in groups until None comes. A run that contradicts the ledger fails its line."""
    open_ended = True
    while open_ended:
        group = [await results.get()]
        await asyncio.sleep(FLUSH_S)
        while len(group) < GROUP and not results.empty():
            group.append(results.get_nowait())
        open_ended = None not in group
        lines = {line.number: (line, result) for line, result in filter(None, group)}
        finished = [result for _, result in lines.values()]
        if not finished:
            continue
        refused = await _asked(partial(batches.finish_lines, services.ledger.database, batch_id, finished))
        again = [failed_line(batch_id, lines[result.number][0], *describe(error)) for result, error in refused]
        if again:
            await _asked(partial(batches.finish_lines, services.ledger.database, batch_id, again))


async def _watch(services: Services, batch: Batch, halted: asyncio.Event) -> None:
    """Say when no further line shall begin: the batch is being cancelled, or its time is over."""
    while not halted.is_set():
        await asyncio.sleep(WATCH_S)
        standing = await _asked(lambda: batches.status(services.ledger.database, batch.id))
        if standing is not BatchStatus.IN_PROGRESS or batch.overdue:
            halted.set()


async def _asked(act: Callable[[], T]) -> T:
    """`_patiently` on the event loop."""
    pause = 0.5
    while True:
        try:
            return await asyncio.to_thread(act)
        except LedgerError as exc:
            log.warning("a batch waits: %s", exc)
        await asyncio.sleep(pause)
        pause = min(2 * pause, LONGEST_WAIT_S)


def _turnstile(services: Services) -> Turnstile:
    if services.loop not in _turnstiles:
        config = ServerConfig(max_concurrent=services.settings.batch.concurrency, max_waiting=1_000_000)
        _turnstiles[services.loop] = Turnstile(config)
    return _turnstiles[services.loop]
