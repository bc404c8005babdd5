"""Takes traces out of files: lines of logs and JSONL, whole datasets and reports, free pages of databases.

Owns bytes on the disk only. What is looked for, and why, is `memory.forget`'s.
"""

from __future__ import annotations

import html
import json
import re
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from memory.errors import LedgerError, boundary
from memory.records import Task, content_hash

MANIFEST = "manifest.json"
"""Marks a folder whose files belong together: a dataset without one of its lines is another dataset."""

SKIPPED = frozenset({"models", "engine-cache", "embedder", "index", "files", "adapters", "rehearsal"})
"""Folders of the data folder without anybody's words, or (`files`) with records of their own."""

SUITES = "suites"
"""The folder of the operator's suites: what stands there decides what is served, whoever said it too."""

WHOLE = 24
"""A shorter text is looked for as all that somebody said: "calculator" stands inside of everything."""

FEW = 64
"""Needles up to which looking for each by itself is quickest."""

ANCHOR = 8
"""Bytes of a needle that are looked for first."""

AROUND = 32
"""Bytes before a short text that show whether it is whole."""

_SAID = (
    (
        re.compile(rb'\\?"(?:content|text|input|value|answer|question|reference)\\?": ?\\?"(?:\s|\\n)*\Z'),
        re.compile(rb'(?:\s|\\n)*\\?"'),
    ),
    (re.compile(rb"<pre>\s*\Z"), re.compile(rb"\s*</pre>")),
    (re.compile(rb"score \d\.\d\d\) \Z"), re.compile(rb"\\+n|\n")),
)
"""Before and behind what was said: a value of JSON, a message on a page, a line of experience in a prompt."""


class Needles:
    """What to look for, in every way in which a file may spell it: ids anywhere, short texts as whole ones only."""

    def __init__(self, ids: Iterable[str], texts: Iterable[str]) -> None:
        parts = {one.encode("utf-8", "surrogatepass") for one in ids}
        wholes: set[bytes] = set()
        for text in texts:
            spelled = wholes if len(text) < WHOLE else parts
            for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], html.escape(text)):
                spelled.add(form.encode("utf-8", "surrogatepass"))
        self._wholes = frozenset(wholes - parts)
        self._every = frozenset(wholes | parts)

    def among(self, data: bytes) -> list[bytes]:
        """Those that occur in the data."""
        if len(self._every) <= FEW:
            return [needle for needle in self._every if self.stands(needle, data)]
        few = (needle for needle in self._every if len(needle) < ANCHOR)
        return [needle for needle in few if self.stands(needle, data)] + self._by_anchor(data)

    def stands(self, needle: bytes, data: bytes) -> bool:
        """Whether one of the needles occurs in the data."""
        if needle not in self._wholes:
            return needle in data
        at = data.find(needle)
        while at >= 0 and not _is_whole(data, at, at + len(needle)):
            at = data.find(needle, at + 1)
        return at >= 0

    @cached_property
    def _anchors(self) -> tuple[Any, dict[int, list[bytes]]]:
        """The first eight bytes of every longer needle as sorted numbers, and the needles of each."""
        import numpy as np

        by_anchor: dict[int, list[bytes]] = {}
        for needle in self._every:
            if len(needle) >= ANCHOR:
                by_anchor.setdefault(int.from_bytes(needle[:ANCHOR], "little"), []).append(needle)
        return np.array(sorted(by_anchor), dtype=np.uint64), by_anchor

    def _by_anchor(self, data: bytes) -> list[bytes]:
        # A tenant has hundreds of thousands of needles: one pass over the data for all, not one for each.
        import numpy as np

        anchors, by_anchor = self._anchors
        found: set[bytes] = set()
        for offset in range(min(ANCHOR, max(0, len(data) - ANCHOR + 1))):
            windows = np.frombuffer(data, dtype="<u8", offset=offset, count=(len(data) - offset) // ANCHOR)
            for at in np.nonzero(np.isin(windows, anchors))[0].tolist():
                start = offset + at * ANCHOR
                found.update(
                    n
                    for n in by_anchor[int(windows[at])]
                    if data.startswith(n, start) and (n not in self._wholes or _is_whole(data, start, start + len(n)))
                )
        return list(found)

    def __bool__(self) -> bool:
        return bool(self._every)


def _is_whole(data: bytes, start: int, end: int) -> bool:
    before = data[max(0, start - AROUND) : start]
    # LangGraph saves its steps as msgpack: a text behind its length.
    size = end - start
    packed = bytes([0xA0 | size]) if size < 32 else bytes([0xD9, size]) if size < 256 else None
    if packed is not None and before.endswith(packed):
        return True
    return any(begins.search(before) and ends.match(data, end) for begins, ends in _SAID)


@dataclass(frozen=True)
class Wanted:
    """What is to go from a data folder."""

    tenant: str
    asked: frozenset[str]
    """Ids of the tasks: where they stand in a suite, it was made of them."""
    needles: Needles
    """By what everything else is known."""
    said: Needles
    """All texts, also those that others said too: a suite that holds one is named."""


def scrub_folder(data_dir: Path, wanted: Wanted) -> tuple[list[str], list[str]]:
    """Take out what is wanted from all files under the data folder; returns what was changed or removed, and the
    suites that hold such a text and were left, since they are the operator's.

    JSONL and logs lose the lines, unless a line names another tenant; a suite loses the tasks that it was made of; a
    dataset, which is whole or worthless, goes, and so does any other file. Databases are left to
    `scrub_checkpoints`. Raises `LedgerError` when the disk refuses.
    """
    touched: list[str] = []
    left: list[str] = []
    with boundary(LedgerError, f"cannot clear {data_dir} of what is to be forgotten"):
        for broken in sorted(data_dir.glob("*.broken-*")):
            # An index that was put aside holds vectors of what was said, and serves nobody.
            shutil.rmtree(broken)
            touched.append(broken.name)
        for path in sorted(data_dir.rglob("*")):
            inside = path.relative_to(data_dir)
            if not path.is_file() or path.is_symlink() or inside.parts[0] in SKIPPED or ".sqlite" in path.name:
                continue
            if path.suffix in (".safetensors", ".lock"):
                continue
            data = path.read_bytes()
            if inside.parts[0] == SUITES or (path.suffix == ".jsonl" and _is_suite(data)):
                if _take_out_tasks(path, data, wanted.asked):
                    touched.append(str(inside))
                if path.exists() and wanted.said.among(path.read_bytes()):
                    left.append(str(inside))
            elif _take_out(path, data, wanted):
                touched.append(str(inside))
    return touched, left


def _take_out(path: Path, data: bytes, wanted: Wanted) -> bool:
    """Take the needles out of a file; whether there were any."""
    found = wanted.needles.among(data)
    if not found:
        return False
    by_lines = path.suffix in (".jsonl", ".log")
    lines = data.splitlines(keepends=True) if by_lines else []
    kept = [
        line
        for line in lines
        if not any(wanted.needles.stands(needle, line) for needle in found) or _of_another(line, wanted.tenant)
    ]
    if by_lines and len(kept) == len(lines):
        return False
    if (path.parent / MANIFEST).exists():
        shutil.rmtree(path.parent)
    elif by_lines:
        # In place: a log is open in the process that writes it, and goes on behind the new end.
        with path.open("r+b") as file:
            file.write(b"".join(kept))
            file.truncate()
    else:
        path.unlink()
    return True


def _of_another(line: bytes, tenant: str) -> bool:
    try:
        row = json.loads(line)
    except ValueError:
        return False
    return isinstance(row, dict) and isinstance(row.get("tenant"), str) and row["tenant"] != tenant


def _is_suite(data: bytes) -> bool:
    try:
        header = json.loads(data.partition(b"\n")[0])
    except ValueError:
        return False
    return isinstance(header, dict) and header.keys() >= {"suite", "role", "hash", "tasks"}


def _take_out_tasks(path: Path, data: bytes, asked: frozenset[str]) -> bool:
    """Take tasks out of a suite, under a new hash; whether there were any. A suite of nothing else goes."""
    try:
        header, *rows = [json.loads(line) for line in data.splitlines()]
        every = [(row["key"], Task.model_validate(row["task"])) for row in rows]
        tasks = [(key, task) for key, task in every if task.id not in asked]
        header |= {"hash": content_hash([[key, task.content] for key, task in tasks]), "tasks": len(tasks)}
    except (ValueError, KeyError, TypeError):
        return False  # no suite, whatever its place
    if len(tasks) == len(every):
        return False
    if not tasks:
        path.unlink()
        return True
    lines = [header, *(row for row in rows if row["task"]["id"] not in asked)]
    draft = path.with_name(f"{path.name}.draft")
    draft.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    draft.replace(path)
    return True


def scrub_checkpoints(path: Path, needles: Needles) -> int:
    """Delete the saved steps of runs that hold a needle, and their bytes; how many runs. For LangGraph's SQLite."""
    if not path.exists():
        return 0
    with (
        boundary(LedgerError, f"cannot clear {path} of what is to be forgotten"),
        closing(sqlite3.connect(path, timeout=15, isolation_level=None)) as connection,
    ):
        connection.execute("PRAGMA secure_delete=ON")
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type='table'")}
        threads: set[str] = set()
        for table in tables & {"checkpoints", "writes"}:
            for row in connection.execute(f"SELECT * FROM {table}"):
                said = b"\0".join(_bytes(value) for value in row)
                if needles.among(said):
                    threads.add(row[0])
        for thread in threads:
            for table in tables & {"checkpoints", "writes"}:
                connection.execute(f"DELETE FROM {table} WHERE thread_id = ?", (thread,))
        # Runs that ended were deleted before, without wiping their pages.
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return len(threads)


def _bytes(value: object) -> bytes:
    return value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogatepass")
