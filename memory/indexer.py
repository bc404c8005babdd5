"""The keeper of the index: a thread that lets it follow the ledger and makes it anew when it is lost.

Nothing waits for it: while the index cannot answer, recall scans the ledger. Owns when the index is worked
on. Owns not how (`memory.index`).
"""

from __future__ import annotations

import logging
import threading

from memory.errors import NightschoolError
from memory.index import Index, drain, rebuild, sync
from memory.ledger import Ledger

log = logging.getLogger(__name__)

RETRY_S = 5.0
"""After work on the index failed (a full disk, an embedder that is down)."""

CLOSE_S = 10.0
"""A rebuild that takes longer is cut off; the next start begins it again."""


class Indexer:
    """Keeps one index up to date in the background. `wake` may be called from any thread."""

    def __init__(self, ledger: Ledger, index: Index) -> None:
        self._ledger = ledger
        self._index = index
        self._due = threading.Event()
        self._rebuild = False
        self._idle = threading.Event()
        self._guard = threading.Lock()
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._work, name="indexer", daemon=True)

    def start(self) -> None:
        """Begin by bringing the index up to date; from now on it calls for its keeper itself."""
        self._index.wake = self.wake
        self.wake()
        self._thread.start()

    def wake(self) -> None:
        """There is something to follow or to repair."""
        with self._guard:
            self._idle.clear()
            self._due.set()

    def reindex(self) -> None:
        """Make the index anew in the background; the old one answers meanwhile."""
        self._rebuild = True
        self.wake()

    def wait(self, timeout_s: float) -> bool:
        """Whether all that was due is done within the time."""
        return self._idle.wait(timeout_s)

    def close(self) -> None:
        """Finish what is being worked on, then end. Before the index is closed."""
        self._stopping.set()
        self._due.set()
        if self._thread.is_alive():
            self._thread.join(CLOSE_S)

    def _work(self) -> None:
        step = sync
        while True:
            self._due.wait()
            if self._stopping.is_set():
                return
            self._due.clear()
            if self._rebuild:
                step, self._rebuild = rebuild, False
            if self._index.needs_rebuild:
                log.warning("the index is being built from the ledger; recall goes on meanwhile")
            try:
                done = step(self._ledger, self._index)
            except Exception as exc:
                if self._stopping.is_set():
                    return
                # Whatever it is, recall does not depend on it, and a thread that died would keep nothing.
                known = isinstance(exc, NightschoolError)
                log.warning(
                    "the index could not follow the ledger, trying again in %g s: %s", RETRY_S, exc, exc_info=not known
                )
                self._stopping.wait(RETRY_S)
                self._due.set()
                continue
            if step is not drain:
                log.info("the index holds %d items", done)
            step = drain
            with self._guard:
                if not self._due.is_set():
                    self._idle.set()
