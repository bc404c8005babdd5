"""What every stage of a night is handed, and how one is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from memory.errors import NightschoolError
from memory.night_records import Night
from serve.events import Emit
from serve.wiring import Services

T = TypeVar("T")
Output = dict[str, Any]


class CancelledNightError(NightschoolError):
    """Somebody asked for the night to stop."""


class OverBudgetError(NightschoolError):
    """The night's budget is spent before there was anything to show for it."""


def _goes_on() -> None:
    """No service that could stop."""


@dataclass(frozen=True)
class NightRun:
    """What every stage is handed: the services, the night, and the outputs of the stages before."""

    services: Services
    night: Night
    emit: Emit
    done: Callable[[str], Output]
    """Output of an earlier stage by name."""
    check: Callable[[], None] = field(default=_goes_on, kw_only=True)
    """Raises `durable.StoppedError` once the service goes down."""

    @property
    def folder(self) -> Path:
        return self.services.settings.night_dir(self.night.id)

    def cancelled(self) -> bool:
        """Asked for by a file, so that the wish survives a crash. Raises `durable.StoppedError` when the service goes
        down: whoever asks this every so often holds nothing up."""
        self.check()
        return (self.folder / "cancel").exists()

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run async work on the service's loop from the night's thread; stops it with the night or the service."""
        future = asyncio.run_coroutine_threadsafe(work, self.services.loop)
        try:
            while not self.cancelled():
                try:
                    return future.result(timeout=0.5)
                except TimeoutError:
                    if future.done():
                        return future.result()
            raise CancelledNightError("the night was cancelled")
        finally:
            future.cancel()


def starts_from(run: NightRun) -> str:
    # A night that was begun by an older version has not said.
    return run.done("snapshot").get("train_from", run.services.settings.night.train_from)
