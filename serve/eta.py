"""How far a running night is and how long it still takes: by its own events, and by how long the stages took in the
last night that had them."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from pydantic import BaseModel

from memory.ledger import Ledger
from memory.night_records import Night
from memory.records import now
from serve.stages import stages_of

COUNTS = (("stage_done", "stage_total"), ("step", "steps"), ("done", "total"))
"""Names under which an event says how much of its stage is done, the widest first."""

KNOWN = 0.1
"""Share of a stage behind which its own pace is believed: where many runs go on at once, the first one's time is no
pace."""

LOOKED_AT = 20
"""Newest nights that are asked how long a stage took."""


class Standing(BaseModel):
    """Where a night is."""

    stage: str
    done: int | None = None
    """Steps or runs of the stage; None for a stage that counts none."""
    total: int | None = None
    left_s: float | None = None
    """Seconds that the stage still takes."""
    night_left_s: float | None = None
    """Seconds that the night still takes; None before there was a night with all the stages that are to come."""


def standing(ledger: Ledger, night: Night, events: list[dict[str, Any]], at: datetime | None = None) -> Standing:
    """Where the night is at a moment (default: now); its events oldest first."""
    at, names = at or now(), stages_of(night)
    stage = events[-1]["stage"] if events else names[0]
    if stage not in names:
        return Standing(stage=stage)
    later = names[names.index(stage) + 1 :]
    took = _took(ledger, night, {stage, *later}) or _took(ledger, night, set(later))
    mine = _attempt(events, stage)
    counts = [count for event in mine if (count := _count(event)) is not None]
    done, total = counts[-1] if counts else (None, None)
    ends = _end(mine, took.get(stage))
    left = round(max(0.0, ends - at.timestamp()), 1) if ends is not None else None
    rest = sum(took[name] for name in later) if took or not later else None
    whole = round(left + rest, 1) if left is not None and rest is not None else None
    return Standing(stage=stage, done=done, total=total, left_s=left, night_left_s=whole)


def _took(ledger: Ledger, night: Night, names: set[str]) -> dict[str, float]:
    """Seconds by stage of the newest other night that has had all of them; empty without one."""
    for other in ledger.nights()[: -LOOKED_AT - 1 : -1]:
        if other.id == night.id:
            continue
        seconds = {stage.stage: stage.seconds for stage in ledger.stages(other.id)}
        if names <= seconds.keys():
            return seconds
    return {}


def _attempt(events: list[dict[str, Any]], stage: str) -> list[dict[str, Any]]:
    """The stage's events since it was begun the last time: between two attempts no service may have run for hours."""
    mine = [event for event in events if event["stage"] == stage]
    begun = [number for number, event in enumerate(mine) if event["message"] == "started"]
    return mine[begun[-1] :] if begun else mine


def _count(event: dict[str, Any]) -> tuple[int, int] | None:
    data = event["data"]
    return next(((data.get(done) or 0, data[total]) for done, total in COUNTS if data.get(total)), None)


def _end(mine: list[dict[str, Any]], took: float | None) -> float | None:
    """When the stage ends: by its own word, by its own pace once that is known, by what it took last time."""
    told = [event for event in mine if event["data"].get("eta_s") is not None]
    if told:
        return _at(told[-1]) + told[-1]["data"]["eta_s"]
    points = [(_at(event), count) for event in mine if (count := _count(event)) is not None]
    if points:
        (began, (before, _)), (last, (done, total)) = points[0], points[-1]
        if done > before and (took is None or done - before >= KNOWN * total):
            return last + (last - began) / (done - before) * (total - done)
    return _at(mine[0]) + took if mine and took is not None else None


def _at(event: dict[str, Any]) -> float:
    return datetime.fromisoformat(event["at"]).timestamp()
