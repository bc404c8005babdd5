"""Nights in the ledger, and what they make: stages, examples, evaluations, generations, promotions.

Functions on an open connection; `memory.ledger.Ledger` gives them their transactions. Owns the rules
of these records' lives, and none of the deciding (`evals.gate`) or serving (`serve`).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from sqlalchemy import Connection, delete, func, insert, select

from memory import rows
from memory.errors import ConflictError, NotFoundError
from memory.night_records import (
    GENERATION_TRANSITIONS,
    Evaluation,
    Generation,
    GenerationStatus,
    Night,
    NightStatus,
    Promotion,
    StageRun,
)
from memory.records import Example, now
from memory.schema import evaluations, examples, generations, nights, promotions, stages

MAX_NUMBER = 2**31 - 1
"""What the databases' integer columns hold: no generation has a higher number."""


def add_generation(connection: Connection, generation: Generation) -> None:
    """Add a generation; a champion only while there is none."""
    number = generation.number
    if generation.status is GenerationStatus.CHAMPION:
        holder = _champion(connection)
        if holder is not None and holder.number != number:
            raise ConflictError(f"generation {number} cannot be added as champion: generation {holder.number} is")
    rows.add(connection, generations, generation, "generation", {"number": number}, status=generation.status)


def generation(connection: Connection, number: int) -> Generation:
    """The generation of that number; raises `NotFoundError`."""
    if not 0 <= number <= MAX_NUMBER:
        raise NotFoundError(f"no generation {number} in the ledger")
    return rows.find(connection, generations, Generation, "generation", {"number": number})


def all_generations(connection: Connection) -> list[Generation]:
    """All generations by number."""
    return rows.read(connection, Generation, select(generations.c.body).order_by(generations.c.number))


def next_generation_number(connection: Connection) -> int:
    """One more than the highest number; 0 in an empty ledger."""
    highest = connection.execute(select(func.max(generations.c.number))).scalar_one()
    return 0 if highest is None else highest + 1


def advance_generation(
    connection: Connection, number: int, to: GenerationStatus, metrics: dict[str, Any] | None
) -> Generation:
    """Move a generation on and add to its metrics; who is champion changes by `promote` alone."""
    standing = generation(connection, number)
    if to is not standing.status:
        _may_become(standing, to)
        if {GenerationStatus.CHAMPION, GenerationStatus.CANARY} & {to, standing.status}:
            raise ConflictError(f"generation {number} is {standing.status}: only a promotion can make it {to}")
    moved = standing.model_copy(update={"status": to, "metrics": {**standing.metrics, **(metrics or {})}})
    rows.put(connection, generations, moved, {"number": number}, status=to)
    return moved


def promote(
    connection: Connection,
    to: int,
    why: str,
    by: str,
    expected_from: int | None,
    evidence: dict[str, Any] | None = None,
    expected_status: GenerationStatus | None = None,
) -> Promotion:
    """Make a generation the champion in place of the present one, and end the trial of another one in canary: it was
    compared with the champion that goes.

    A repeated call, when the last promotion did just this, returns that promotion.
    Raises `ConflictError` if the champion is not `expected_from`, the generation is not `expected_status`, or the move
    is illegal.
    """
    old = champion(connection)
    if old.number == to:
        last = _last_promotion(connection)
        if last is not None and last.to_generation == to and expected_from in (None, last.from_generation):
            return last
        raise ConflictError(f"generation {to} is the champion already")
    _check_champion(old, expected_from)
    new = generation(connection, to)
    if expected_status not in (None, new.status):
        raise ConflictError(f"generation {to} is {new.status}, not {expected_status}: it changed meanwhile")
    _may_become(new, GenerationStatus.CHAMPION)
    running = canary(connection)
    if running is not None and running.number != to:
        # Before the switch, whose row stays the log's last.
        end_canary(connection, f"generation {to} becomes the champion, it was on trial against another", by, None)
    for moved, status in ((old, GenerationStatus.RETIRED), (new, GenerationStatus.CHAMPION)):
        after = moved.model_copy(update={"status": status})
        rows.put(connection, generations, after, {"number": moved.number}, status=status)
    return _log(connection, Promotion(from_generation=old.number, to_generation=to, why=why, by=by, evidence=evidence))


def _log(connection: Connection, promotion: Promotion) -> Promotion:
    columns = {"from_generation": promotion.from_generation, "to_generation": promotion.to_generation}
    rows.add(connection, promotions, promotion, "promotion", {"id": promotion.id}, **columns)
    return promotion


def _check_champion(standing: Generation, expected: int | None) -> None:
    if expected not in (None, standing.number):
        raise ConflictError(f"the champion is generation {standing.number}, not {expected}: it changed meanwhile")


def begin_canary(
    connection: Connection, number: int, share: float, why: str, by: str, expected_from: int | None = None
) -> Generation:
    """Give a generation a share of the users; one that has one already makes place. The same share again is a no-op.

    Raises `ConflictError` if the champion is not `expected_from`, for the champion itself and a rejected generation.
    """
    _check_champion(champion(connection), expected_from)
    standing, running = generation(connection, number), canary(connection)
    if running is not None and running.number == number:
        if running.metrics["canary"]["share"] == share:
            return running
    else:
        _may_become(standing, GenerationStatus.CANARY)
        if running is not None:
            end_canary(connection, f"generation {number} takes its place", by, None)
    told = {"share": share, "since": now().isoformat(), "why": why, "by": by}
    begun = standing.model_copy(
        update={"status": GenerationStatus.CANARY, "metrics": {**standing.metrics, "canary": told}}
    )
    rows.put(connection, generations, begun, {"number": number}, status=GenerationStatus.CANARY)
    return begun


def end_canary(
    connection: Connection, why: str, by: str, evidence: dict[str, Any] | None, expected: int | None = None
) -> Promotion:
    """All users back to the champion, with a row in the log. `ConflictError` when no generation (or not the
    `expected` one) is in canary."""
    running = canary(connection)
    if running is None or expected not in (None, running.number):
        raise ConflictError(f"generation {expected} is not in canary" if expected else "no generation is in canary")
    ended = running.model_copy(update={"status": GenerationStatus.RETIRED})
    rows.put(connection, generations, ended, {"number": running.number}, status=GenerationStatus.RETIRED)
    back = champion(connection).number
    return _log(
        connection, Promotion(from_generation=running.number, to_generation=back, why=why, by=by, evidence=evidence)
    )


def canary(connection: Connection) -> Generation | None:
    """The generation that serves a share of the users, if one does."""
    query = select(generations.c.body).where(generations.c.status == GenerationStatus.CANARY)
    return next(iter(rows.read(connection, Generation, query)), None)


def _may_become(standing: Generation, to: GenerationStatus) -> None:
    if to not in GENERATION_TRANSITIONS[standing.status]:
        raise ConflictError(f"generation {standing.number} is {standing.status}: it cannot become {to}")


def champion(connection: Connection) -> Generation:
    """What is served; raises `NotFoundError` before the first start."""
    holder = _champion(connection)
    if holder is None:
        raise NotFoundError("the ledger has no champion yet: start the service once, or add generation 0")
    return holder


def _champion(connection: Connection) -> Generation | None:
    query = select(generations.c.body).where(generations.c.status == GenerationStatus.CHAMPION)
    return next(iter(rows.read(connection, Generation, query)), None)


def all_promotions(connection: Connection) -> list[Promotion]:
    """The log of what was served, oldest first."""
    return rows.read(connection, Promotion, select(promotions.c.body).order_by(promotions.c.seq))


def _last_promotion(connection: Connection) -> Promotion | None:
    query = select(promotions.c.body).order_by(promotions.c.seq.desc()).limit(1)
    return next(iter(rows.read(connection, Promotion, query)), None)


def add_night(connection: Connection, night: Night) -> None:
    """Add a night; ConflictError while another one runs. (One transaction writes at a time: no two get past this.)"""
    others = select(nights.c.id).where(nights.c.status == NightStatus.RUNNING, nights.c.id != night.id)
    running = connection.execute(others).scalars().first()
    if running is not None:
        raise ConflictError(f"night {running} is running; wait for it or cancel it")
    rows.add(connection, nights, night, "night", {"id": night.id}, status=night.status)


def night(connection: Connection, night_id: str) -> Night:
    """The night of that id; raises `NotFoundError`."""
    return rows.find(connection, nights, Night, "night", {"id": night_id})


def all_nights(connection: Connection) -> list[Night]:
    """All nights, oldest first."""
    return rows.read(connection, Night, select(nights.c.body).order_by(nights.c.seq))


def end_night(connection: Connection, night_id: str, status: NightStatus, **ending: Any) -> Night:
    """End a night once; `ending`: the record's fields that become known now, None to keep one."""
    if status is NightStatus.RUNNING:
        raise ConflictError(f"night {night_id!r} cannot end as {status}")
    standing = night(connection, night_id)
    if standing.status is not NightStatus.RUNNING:
        if standing.status is status:
            return standing
        raise ConflictError(f"night {night_id!r} has ended as {standing.status}: it cannot end as {status}")
    known = {name: value for name, value in ending.items() if value is not None}
    ended = standing.model_copy(update={"status": status, "ended_at": now(), **known})
    rows.put(connection, nights, ended, {"id": night_id}, status=status)
    return ended


def set_candidate(connection: Connection, night_id: str, number: int) -> None:
    """Note which generation a running night is making."""
    standing = night(connection, night_id)
    if standing.candidate == number:
        return
    if standing.status is not NightStatus.RUNNING:
        raise ConflictError(f"night {night_id!r} has ended as {standing.status}: its candidate stays")
    rows.put(connection, nights, standing.model_copy(update={"candidate": number}), {"id": night_id})


def set_limits(connection: Connection, night_id: str, limits: dict[str, Any]) -> None:
    """Note what a night's training may spend, unless that is decided already."""
    standing = night(connection, night_id)
    if standing.limits is None:
        rows.put(connection, nights, standing.model_copy(update={"limits": limits}), {"id": night_id})


def record_stage(connection: Connection, stage_run: StageRun) -> StageRun:
    """Keep a stage's output unless the night has one for it already; returns the one that is kept."""
    night(connection, stage_run.night_id)
    kept = stage(connection, stage_run.night_id, stage_run.stage)
    if kept is not None:
        return kept
    key = {"night_id": stage_run.night_id, "stage": stage_run.stage}
    rows.add(connection, stages, stage_run, "stage", key)
    return stage_run


def stage(connection: Connection, night_id: str, name: str) -> StageRun | None:
    """The finished stage, or None."""
    query = select(stages.c.body).where(stages.c.night_id == night_id, stages.c.stage == name)
    return next(iter(rows.read(connection, StageRun, query)), None)


def all_stages(connection: Connection, night_id: str) -> list[StageRun]:
    """A night's finished stages, in the order they finished."""
    return rows.read(
        connection, StageRun, select(stages.c.body).where(stages.c.night_id == night_id).order_by(stages.c.seq)
    )


def set_examples(connection: Connection, night_id: str, made: Iterable[Example]) -> None:
    """Keep what a night trains on, in place of what an attempt that died may have written; one id has one content."""
    night(connection, night_id)
    connection.execute(delete(examples).where(examples.c.night_id == night_id))
    known: dict[str, str] = {}
    new: list[dict[str, str]] = []
    for example in made:
        body = rows.dump(example)
        digest = rows.digest_of(body)
        if example.id not in known:
            known[example.id] = digest
            new.append({"night_id": night_id, "id": example.id, "digest": digest, "body": body})
        elif known[example.id] != digest:
            raise ConflictError(f"example {example.id!r} is in night {night_id!r} twice, with different content")
    if new:
        connection.execute(insert(examples), new)


def all_examples(connection: Connection, night_id: str) -> list[Example]:
    """What a night trained on, in the order it was added."""
    query = select(examples.c.body).where(examples.c.night_id == night_id).order_by(examples.c.seq)
    return rows.read(connection, Example, query)


def add_evaluation(connection: Connection, evaluation: Evaluation) -> None:
    """Add an evaluation; its night, when it names one, must be in the ledger."""
    if evaluation.night_id is not None:
        night(connection, evaluation.night_id)
    columns = {
        "night_id": evaluation.night_id,
        "generation": evaluation.generation,
        "suite_hash": evaluation.suite_hash,
    }
    rows.add(connection, evaluations, evaluation, "evaluation", {"id": evaluation.id}, **columns)


def find_evaluations(
    connection: Connection, night_id: str | None, generation_number: int | None, suite_hash: str | None
) -> list[Evaluation]:
    """Evaluations, oldest first; None leaves a filter out."""
    query = select(evaluations.c.body).order_by(evaluations.c.seq)
    if night_id is not None:
        query = query.where(evaluations.c.night_id == night_id)
    if generation_number is not None and not 0 <= generation_number <= MAX_NUMBER:
        return []
    if generation_number is not None:
        query = query.where(evaluations.c.generation == generation_number)
    if suite_hash is not None:
        query = query.where(evaluations.c.suite_hash == suite_hash)
    return rows.read(connection, Evaluation, query)
