"""A night's live events: one JSON object per line in the night's folder, append-only.

They are for watching. What a night decided is in the ledger.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from memory.jsonl import lines_of
from memory.records import now

EVENTS_FILE = "events.jsonl"
Emit = Callable[..., None]
"""emit(stage, message, **data)"""


def emitter(folder: Path) -> Emit:
    """A function that appends an event to the night in `folder`."""

    def emit(stage: str, message: str, /, **data: Any) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        event = {"at": now().isoformat(), "stage": stage, "message": message, "data": data}
        with (folder / EVENTS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(event, ensure_ascii=False, default=str) + "\n")

    return emit


def read_events(folder: Path, after: int = 0) -> list[dict[str, Any]]:
    """The events from number `after` on; each carries its number as `seq`. A half-written last line waits."""
    path = folder / EVENTS_FILE
    if not path.exists():
        return []
    complete = path.read_text(encoding="utf-8").rpartition("\n")[0]
    lines = enumerate(lines_of(complete))
    return [{"seq": i, **json.loads(line)} for i, line in lines if i >= after and line.startswith("{")]
