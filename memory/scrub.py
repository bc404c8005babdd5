"""Takes traces out of files: lines of logs and JSONL, whole datasets and reports, free pages of databases.

Owns bytes on the disk only. What is looked for, and why, is `memory.forget`'s.
"""

from __future__ import annotations

import html
import json
import shutil
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from functools import cached_property
from pathlib import Path
from typing import Any

from memory.errors import LedgerError, boundary

MANIFEST = "manifest.json"
"""Marks a folder whose files belong together: a dataset without one of its lines is another dataset."""

SKIPPED = frozenset({"models", "engine-cache", "embedder", "index", "files"})
"""Folders of the data folder without anybody's words, or (`files`) with records of their own."""


FEW = 64
"""Needles up to which looking for each by itself is quickest."""

ANCHOR = 8
"""Bytes of a needle that are looked for first."""


class Needles:
    """What to look for, in every way in which a file may spell it."""

    def __init__(self, ids: Iterable[str], texts: Iterable[str]) -> None:
        self.ids = frozenset(one.encode() for one in ids)
        spelled: set[bytes] = set()
        for text in texts:
            for form in (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1], html.escape(text)):
                spelled.add(form.encode("utf-8", "surrogatepass"))
        self.texts = frozenset(spelled)

    def among(self, data: bytes) -> list[bytes]:
        """Those that occur in the data."""
        every = self.ids | self.texts
        if len(every) <= FEW:
            return [needle for needle in every if needle in data]
        return [needle for needle in every if len(needle) < ANCHOR and needle in data] + self._by_anchor(data)

    @cached_property
    def _anchors(self) -> tuple[Any, dict[int, list[bytes]]]:
        """The first eight bytes of every longer needle as sorted numbers, and the needles of each."""
        import numpy as np

        by_anchor: dict[int, list[bytes]] = {}
        for needle in self.ids | self.texts:
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
                found.update(n for n in by_anchor[int(windows[at])] if data.startswith(n, start))
        return list(found)

    def __bool__(self) -> bool:
        return bool(self.ids or self.texts)


def scrub_folder(data_dir: Path, needles: Needles) -> list[str]:
    """Take the needles out of all files under the data folder; returns what was changed or removed.

    JSONL and logs lose the lines; a dataset or frozen suite, which is whole or worthless, goes, and so does any
    other file. Databases are left to `scrub_checkpoints`. Raises `LedgerError` when the disk refuses.
    """
    touched: list[str] = []
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
            if found := needles.among(path.read_bytes()):
                _take_out(path, found)
                touched.append(str(inside))
    return touched


def _take_out(path: Path, found: list[bytes]) -> None:
    if (path.parent / MANIFEST).exists():
        shutil.rmtree(path.parent)
        return
    lines = path.read_bytes().splitlines(keepends=True)
    frozen = path.suffix == ".jsonl" and b'"suite"' in lines[0]
    if path.suffix not in (".jsonl", ".log") or frozen:
        path.unlink()
        return
    kept = b"".join(line for line in lines if not any(needle in line for needle in found))
    # In place: a log is open in the process that writes it, and goes on behind the new end.
    with path.open("r+b") as file:
        file.write(kept)
        file.truncate()


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
