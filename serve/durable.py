"""DBOS, started once for all durable workflows (nights, batches), and the running parts that they work on.

A workflow is a module's function, registered when the module is imported; it finds the service through
`services()`, because what DBOS stores of a call must be plain data.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

from dbos import DBOS, DBOSConfig

from memory import files
from memory.errors import ConfigError
from serve.wiring import Services

T = TypeVar("T")

_running: Services | None = None
_stopping = threading.Event()


class StoppedError(BaseException):
    """The service goes down. Not an `Exception`, so DBOS does not take it for the workflow's result: the workflow
    stays unfinished and goes on at the next start."""


class Waiter:
    """How a workflow's thread waits without outliving the service: each method raises `StoppedError` once it stops."""

    def __init__(self, loop: asyncio.AbstractEventLoop, stopping: threading.Event) -> None:
        self._loop = loop
        self._stopping = stopping

    def check(self) -> None:
        """Go on, unless the service stops."""
        if self._stopping.is_set():
            raise StoppedError

    def pause(self, seconds: float) -> None:
        """Sleep."""
        self._stopping.wait(seconds)
        self.check()

    def on_loop(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of async work on the service's loop; cancelled when the service stops."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        while True:
            try:
                return future.result(timeout=0.1)
            except TimeoutError:
                if future.done():
                    raise
                if self._stopping.is_set():
                    future.cancel()
                    raise StoppedError from None


def services() -> Services:
    """The running parts, inside a workflow."""
    assert _running is not None, "no service is running in this process"
    return _running


def waiter() -> Waiter:
    """Waiting, inside a workflow; to be asked for at its start."""
    return Waiter(services().loop, _stopping)


def launch(parts: Services) -> None:
    """Start DBOS on its database: unfinished workflows of the last process go on by themselves.

    ConfigError when the database cannot be used.
    """
    global _running, _stopping
    files.sweep(parts.ledger.database, parts.settings.files_dir)
    _running, _stopping = parts, threading.Event()
    config: DBOSConfig = {
        "name": "nightschool",
        "system_database_url": parts.settings.workflows_url,
        "application_version": "1",
        "log_level": "WARNING",
    }
    try:
        DBOS(config=config)
        DBOS.launch()
    except Exception as exc:
        shut_down()
        why = str(exc).split("\n")[0]
        raise ConfigError(f"the workflows' database (durable_url) cannot be used: {why}") from exc


def shut_down() -> None:
    """Stop DBOS; unfinished workflows go on at the next start."""
    global _running
    _stopping.set()
    DBOS.destroy(destroy_registry=False)
    _running = None
