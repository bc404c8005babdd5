"""Forgetting: everything of a tenant, or of one user of a tenant, deleted everywhere, and what learned from it named.

Owns what is done to rows, to the traces they left in other rows (a recalled run in somebody else's prompt, an example
in a night) and the tombstone, which holds numbers and never data. Which they are is `memory.traces`', files are
`memory.scrub`'s; the index is rebuilt by its keeper.

First the files, then all rows in one transaction, then the free pages: whoever is interrupted asks again, and
`finish` does the last part at the next start. What cannot be taken back are weights: the generations that saw
the data are listed, and the next night starts from the base model (`must_start_from_base`).

API keys stay: they are access, not data. So do a tenant's name and its nights' options.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from pydantic import Field
from sqlalchemy import Connection, Table, delete, select, update

from memory import nights, rows
from memory.database import Database
from memory.errors import ConflictError
from memory.items import MODELS, Item
from memory.night_records import Evaluation, Generation, NightStatus
from memory.records import (
    LOOKED_UP,
    RECALLED,
    Example,
    MemoryKind,
    MemoryStatus,
    Record,
    Trajectory,
    new_id,
    now,
)
from memory.schema import (
    batch_lines,
    batches,
    chunk_outbox,
    chunks,
    escalations,
    evaluations,
    examples,
    feedback,
    files,
    forgotten,
    generations,
    item_origins,
    item_uses,
    items,
    outbox,
    replies,
    responses,
    tasks,
    trajectories,
)
from memory.schema import documents as documents_table
from memory.schema import nights as nights_table
from memory.scrub import Needles, scrub_checkpoints, scrub_folder
from memory.traces import REHEARSAL, Traces, gather, without_sentences

ENDED_BATCHES = ("failed", "completed", "expired", "cancelled")
GONE = "[forgotten]"


class Forgotten(Record):
    """The tombstone: what was deleted and what had learned from it."""

    id: str = Field(default_factory=lambda: new_id("forget"))
    tenant: str
    user: str | None = None
    by: str
    counts: dict[str, int] = Field(default_factory=dict)
    """Table -> rows deleted; `cleared` counts rows of others from which a trace was taken."""
    files: list[str] = Field(default_factory=list)
    """Files of the data folder that were changed or removed."""
    left: list[str] = Field(default_factory=list)
    """Suites that hold such a text and were left: the operator's own."""
    nights: list[str] = Field(default_factory=list)
    """Nights that trained on it."""
    generations: list[int] = Field(default_factory=list)
    """Generations that learned from it, and those that were trained on from them."""
    at: datetime = Field(default_factory=now)


def forget(database: Database, data_dir: Path, *, tenant: str, user: str | None = None, by: str) -> Forgotten:
    """Delete everything of the tenant, or of the user within it; `by`: who asked.

    A user's (or a key's, `key:ann`) are the tasks asked in its name, their runs, its feedback, and whatever was made
    from these. The caller reindexes afterwards. Raises `ConflictError` while a night or a batch of the tenant is
    going on, and `LedgerError`, upon which the call is to be repeated.
    """
    with database.reading() as connection:
        _check_quiet(connection, tenant)
        before = gather(connection, tenant, user)
    touched, left = scrub_folder(data_dir, before.wanted()) if before.needles() else ([], [])
    with database.writing() as connection:
        if connection.dialect.name == "sqlite":
            connection.exec_driver_sql("PRAGMA secure_delete=ON")
        _check_quiet(connection, tenant)
        traces = gather(connection, tenant, user, before)
        counts, learned, unlinked = _delete(connection, traces, data_dir)
        seen = _generations_of(connection, learned)
        record = Forgotten(tenant=tenant, user=user, by=by, counts=counts, nights=sorted(learned), generations=seen)
        record = record.model_copy(update={"files": sorted({*touched, *unlinked}), "left": left})
        rows.add(connection, forgotten, record, "forgetting", {"id": record.id}, tenant=tenant, finished=False)
    for name in unlinked:
        (data_dir / name).unlink(missing_ok=True)
    if traces.needles():
        # What was asked between the look and the deletion has left its traces too.
        late, left = scrub_folder(data_dir, traces.wanted())
        scrub_checkpoints(data_dir / "checkpoints.sqlite", traces.needles())
        if late or left != record.left:
            record = record.model_copy(update={"files": sorted({*record.files, *late}), "left": left})
            with database.writing() as connection:
                rows.put(connection, forgotten, record, {"id": record.id})
    finish(database)
    return record


def finish(database: Database) -> int:
    """Wipe the free pages after forgettings that were not finished; how many. Also for the start of the service."""
    with database.reading() as connection:
        waiting = connection.execute(select(forgotten.c.id).where(forgotten.c.finished.is_(False))).scalars().all()
    if waiting:
        database.compact()
        with database.writing() as connection:
            connection.execute(update(forgotten).where(forgotten.c.id.in_(waiting)).values(finished=True))
    return len(waiting)


def all_forgotten(database: Database, *, tenant: str) -> list[Forgotten]:
    """A tenant's tombstones, oldest first."""
    query = select(forgotten.c.body).where(forgotten.c.tenant == tenant).order_by(forgotten.c.seq)
    with database.reading() as connection:
        return rows.read(connection, Forgotten, query)


def newest_forgetting(database: Database) -> datetime | None:
    """When something was forgotten last, of any tenant."""
    with database.reading() as connection:
        newest = rows.read(connection, Forgotten, select(forgotten.c.body).order_by(forgotten.c.seq.desc()).limit(1))
    return newest[0].at if newest else None


def must_start_from_base(database: Database, generation: Generation) -> bool:
    """Whether a generation, or one that it was trained on from, learned from what is forgotten by now."""
    with database.reading() as connection:
        tombstones = rows.read(connection, Forgotten, select(forgotten.c.body))
        tainted = {number for tombstone in tombstones for number in tombstone.generations}
        known = {g.number: g for g in nights.all_generations(connection)}
    seen: set[int] = set()
    at: Generation | None = generation
    while at is not None and at.number not in seen:
        if at.number in tainted:
            return True
        seen.add(at.number)
        at = known.get(at.parent) if at.parent is not None else None
    return False


def _check_quiet(connection: Connection, tenant: str) -> None:
    query = select(nights_table.c.id).where(nights_table.c.status == NightStatus.RUNNING)
    if (night := connection.execute(query).scalars().first()) is not None:
        raise ConflictError(f"night {night} is running and reads what is to be forgotten: wait for it or cancel it")
    going_on = batches.c.tenant == tenant, batches.c.status.not_in(ENDED_BATCHES)
    if (batch := connection.execute(select(batches.c.id).where(*going_on)).scalars().first()) is not None:
        raise ConflictError(f"batch {batch} of tenant {tenant!r} is not over: wait for it or cancel it")


def _delete(connection: Connection, traces: Traces, data_dir: Path) -> tuple[dict[str, int], set[str], list[str]]:
    """Rows deleted by table, the nights that had trained on some of them, and the files to unlink."""
    counts: Counter[str] = Counter()
    needles = traces.needles()
    learned = _forget_examples(connection, traces, needles, counts)
    _clear_others(connection, traces, counts)
    _clear_evaluations(connection, traces, counts)
    _revive(connection, traces)
    for table, column, ids in (
        (outbox, outbox.c.item_id, traces.items),
        (item_uses, item_uses.c.item_id, traces.items),
        (item_uses, item_uses.c.use_key, traces.runs),
        (item_origins, item_origins.c.item_id, traces.items),
        (items, items.c.id, traces.items),
        (chunk_outbox, chunk_outbox.c.chunk_id, traces.chunks),
        (chunks, chunks.c.document_id, traces.documents),
        (documents_table, documents_table.c.id, traces.documents),
        (responses, responses.c.trajectory_id, traces.runs),
        (feedback, feedback.c.id, traces.feedback),
        (escalations, escalations.c.task_id, traces.tasks),
        (trajectories, trajectories.c.id, traces.runs),
        (tasks, tasks.c.id, traces.tasks),
    ):
        counts[table.name] += _delete_by(connection, table, column, ids)
    unlinked = _forget_bulk(connection, traces, needles, data_dir, counts)
    return {name: n for name, n in counts.items() if n}, learned, unlinked


def _forget_examples(connection: Connection, traces: Traces, needles: Needles, counts: Counter[str]) -> set[str]:
    """Examples made from what goes, or showing it in their prompt; returns their nights."""
    gone = traces.runs | traces.feedback
    learned: set[str] = set()
    doomed: list[int] = []
    for row in connection.execute(select(examples.c.seq, examples.c.night_id, examples.c.body)):
        example = rows.load(Example, row.body)
        if example.tenant != traces.tenant or example.recipe == REHEARSAL:
            continue
        own = traces.user is None or example.task_id in traces.tasks or bool(gone & set(example.sources))
        if own or needles.among(row.body.encode()):
            doomed.append(row.seq)
            learned.add(row.night_id)
    for start in range(0, len(doomed), rows.CHUNK):
        part = doomed[start : start + rows.CHUNK]
        counts[examples.name] += connection.execute(delete(examples).where(examples.c.seq.in_(part))).rowcount
    return learned


def _clear_others(connection: Connection, traces: Traces, counts: Counter[str]) -> None:
    """Runs of others in the tenant that were shown an item, a passage or a hint that goes: the run stays, what was
    shown does not."""
    if not traces.shown or traces.user is None:
        return
    # Most runs name none of it, and all of a tenant's are too many to hold.
    named = Needles({json.dumps(id)[1:-1] for id in traces.shown}, ())
    query = select(trajectories.c.id, trajectories.c.body).where(trajectories.c.tenant == traces.tenant)
    naming = (
        rows.load(Trajectory, row.body)
        for row in connection.execute(query.execution_options(yield_per=rows.CHUNK))
        if row.id not in traces.runs and named.among(row.body.encode())
    )
    for run in [run for run in naming if traces.showed(run)]:
        messages = [
            {"role": m["role"], "content": GONE, "name": RECALLED}
            if m.get("name") == RECALLED
            else {**m, "content": GONE}
            if m.get("name") == LOOKED_UP
            else without_sentences(m, traces.sentences)
            for m in run.messages
        ]
        # The prompt's token ids spell the same words.
        steps = [step.model_copy(update={"prompt_token_ids": None}) for step in run.steps]
        kept = [item for item in run.recalled if item.id not in traces.shown]
        left = [passage for passage in run.consulted if passage.document_id not in traces.documents]
        changed = {"messages": messages, "steps": steps, "recalled": kept, "consulted": left}
        cleared = run.model_copy(update=changed)
        rows.put(connection, trajectories, cleared, {"id": run.id})
        counts["cleared"] += 1


def _clear_evaluations(connection: Connection, traces: Traces, counts: Counter[str]) -> None:
    """Exams that asked what goes keep their scores and lose the answers."""
    for evaluation in rows.read(connection, Evaluation, select(evaluations.c.body)):
        if not traces.runs & {o.trajectory_id for o in evaluation.outcomes}:
            continue
        outcomes = [
            o.model_copy(update={"answer": None, "trajectory_id": None}) if o.trajectory_id in traces.runs else o
            for o in evaluation.outcomes
        ]
        rows.put(connection, evaluations, evaluation.model_copy(update={"outcomes": outcomes}), {"id": evaluation.id})
        counts["cleared"] += 1


def _revive(connection: Connection, traces: Traces) -> None:
    """An item that was merged into one that goes, and owes nothing to what goes, stands for itself again."""
    if traces.user is None:
        return
    mine = items.c.tenant == traces.tenant, items.c.status == MemoryStatus.MERGED
    for row in connection.execute(select(items.c.kind, items.c.body).where(*mine)).all():
        item: Item = rows.load(MODELS[MemoryKind(row.kind)], row.body)
        if item.merged_into in traces.items and item.id not in traces.items:
            alone = item.model_copy(update={"status": MemoryStatus.ACTIVE, "merged_into": None})
            rows.put(connection, items, alone, {"id": item.id}, status=alone.status)
            change = {"item_id": item.id, "kind": row.kind, "op": "upsert", "acked": False}
            connection.execute(outbox.insert().values(**change, why="the item it was merged into is forgotten"))


def _forget_bulk(
    connection: Connection, traces: Traces, needles: Needles, data_dir: Path, counts: Counter[str]
) -> list[str]:
    """Batches, files and idempotent replies; returns the files to unlink."""
    mine = select(batches.c.id).where(batches.c.tenant == traces.tenant)
    if traces.user is None:
        for table, column in ((batch_lines, batch_lines.c.batch_id), (batches, batches.c.id)):
            counts[table.name] += connection.execute(delete(table).where(column.in_(mine))).rowcount
        stored = connection.execute(select(files.c.id).where(files.c.tenant == traces.tenant)).scalars().all()
        counts[files.name] += connection.execute(delete(files).where(files.c.tenant == traces.tenant)).rowcount
        for table in (replies, responses):
            counts[table.name] += connection.execute(delete(table).where(table.c.tenant == traces.tenant)).rowcount
        return [f"files/{file_id}" for file_id in stored]
    named = Needles({f'"user":"{traces.user}"', f'"user": "{traces.user}"'}, ())
    doomed: list[tuple[str, int]] = []
    for row in connection.execute(select(batch_lines).where(batch_lines.c.batch_id.in_(mine))):
        said = f"{row.request}\0{row.result or ''}".encode("utf-8", "surrogatepass")
        if needles.among(said) or named.among(said):
            doomed.append((row.batch_id, row.line))
    for batch_id, line in doomed:
        its = batch_lines.c.batch_id == batch_id, batch_lines.c.line == line
        counts[batch_lines.name] += connection.execute(delete(batch_lines).where(*its)).rowcount
    for row in connection.execute(select(replies.c.seq, replies.c.body).where(replies.c.tenant == traces.tenant)).all():
        if needles.among(row.body.encode()) or needles.among(rows.unescaped(row.body)):
            counts[replies.name] += connection.execute(delete(replies).where(replies.c.seq == row.seq)).rowcount
    unlinked: list[str] = []
    for file_id in connection.execute(select(files.c.id).where(files.c.tenant == traces.tenant)).scalars().all():
        path = data_dir / "files" / file_id
        said = path.read_bytes() if path.exists() else b""
        if needles.among(said) or named.among(said):
            counts[files.name] += connection.execute(delete(files).where(files.c.id == file_id)).rowcount
            unlinked.append(f"files/{file_id}")
    return unlinked


def _generations_of(connection: Connection, night_ids: set[str]) -> list[int]:
    """The generations that those nights made, and all that were trained on from them."""
    everything = rows.read(connection, Generation, select(generations.c.body).order_by(generations.c.number))
    found = {g.number for g in everything if g.night_id in night_ids}
    for generation in everything:  # parents have lower numbers
        if generation.parent in found:
            found.add(generation.number)
    return sorted(found)


def _delete_by(connection: Connection, table: Table, column: Any, ids: Iterable[str]) -> int:
    return sum(connection.execute(delete(table).where(column.in_(part))).rowcount for part in rows.chunks(ids))
