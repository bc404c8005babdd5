"""The watch at work: live outcomes are looked at as they are committed, and a generation that proves worse goes back.

It reads the ledger behind the last number it has seen, a few times a second and beside all requests, so it meets every
outcome, by whatever way or process it came; before it does something, it reads all of them anew. A rollback is one row
of the promotion log with its evidence, and starts no watch of its own: what was rolled back comes again only when
somebody promotes it. Owns no rule of what counts (`evals.live`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from evals.live import LiveVerdict, WatchConfig, judge
from memory import outcomes
from memory.errors import ConflictError, NightschoolError
from memory.ledger import Ledger
from memory.night_records import GenerationStatus, Promotion
from memory.outcomes import LiveRun, LiveScore
from serve import promotion
from serve.adapters import Residency
from serve.wiring import Services

log = logging.getLogger(__name__)

BY = "watch"
AGAIN_S = 10.0
"""After a rollback that could not be done, or a ledger that did not answer."""
HEARD_S = 60.0
"""How long a score is taken for what it was when it was read: it may be rejected since."""


@dataclass(frozen=True)
class Watched:
    """Two generations that live outcomes compare."""

    old: int
    new: int
    since: datetime
    canary: bool


def watched(ledger: Ledger) -> list[Watched]:
    """Which generation is on probation against which: the champion against the one that it replaced, a canary against
    the champion. None after a rollback: what served before needs no probation."""
    pairs: list[Watched] = []
    served, last = [0], None
    for row in ledger.promotions():
        if row.from_generation != served[-1]:
            continue  # the end of a canary
        if row.to_generation in served:
            del served[served.index(row.to_generation) + 1 :]
            last = None
        else:
            served.append(row.to_generation)
            last = row
    if last is not None:
        pairs.append(Watched(last.from_generation, last.to_generation, last.at, canary=False))
    canary = ledger.canary()
    if canary is not None:
        since = datetime.fromisoformat(canary.metrics["canary"]["since"])
        pairs.append(Watched(ledger.serving().number, canary.number, since, canary=True))
    return pairs


class LiveOutcomes:
    """The live outcomes so far, read on from where the last look ended. Belongs to one thread at a time."""

    def __init__(self, ledger: Ledger, config: WatchConfig) -> None:
        self._ledger = ledger
        self._config = config
        self._seen: dict[str, int] = {}
        self._first = 0
        self._heard = 0.0
        self._judged: tuple[Any, ...] = ()
        self._runs: list[LiveRun] = []
        self._scores: list[LiveScore] = []

    def look(self) -> list[tuple[Watched, LiveVerdict]]:
        """What the outcomes say of every generation on probation; nothing when nothing is new."""
        now = self._ledger.watermark()
        canary = self._ledger.canary()
        state = (now, self._ledger.serving().number, canary.number if canary else None)
        if state == self._judged:
            return []
        known = bool(self._seen)
        self._read(now, anew=not known)
        found = self._verdicts()
        if known and any(self._tips(*each) for each in found):
            # What is remembered may have been rejected or forgotten since: nothing is done on its word.
            self._read(now, anew=True)
            found = self._verdicts()
        self._judged = state
        return found

    def forget_verdicts(self) -> None:
        """Judge again at the next look, also when nothing new has come."""
        self._judged = ()

    def _tips(self, pair: Watched, verdict: LiveVerdict) -> bool:
        return verdict.worse or (pair.canary and verdict.compared >= self._config.canary_outcomes)

    def _read(self, now: dict[str, int], *, anew: bool) -> None:
        database = self._ledger.database
        if not self._seen:
            self._first = outcomes.start_of(database, self._config.history)
        if anew:
            self._seen["trajectory"], self._runs = self._first, []
        if anew or time.monotonic() - self._heard > HEARD_S:
            self._seen["feedback"], self._scores = 0, []
            self._heard = time.monotonic()
        self._runs += outcomes.verified_runs(database, self._seen["trajectory"], now["trajectory"])
        self._scores += outcomes.scores(database, self._seen["feedback"], now["feedback"], self._first)
        self._runs = self._runs[-self._config.history :]
        self._scores = self._scores[-self._config.history :]
        self._seen = dict(now)

    def _verdicts(self) -> list[tuple[Watched, LiveVerdict]]:
        return [
            (pair, judge(self._runs, self._scores, old=pair.old, new=pair.new, since=pair.since, config=self._config))
            for pair in watched(self._ledger)
        ]


@asynccontextmanager
async def kept(services: Services) -> AsyncIterator[None]:
    """The watch, for as long as the block lasts; nothing when it is switched off."""
    config = services.settings.watch
    if not config.enabled:
        yield
        return
    keeper = asyncio.create_task(_keep(services.ledger, services.residency, config))
    try:
        yield
    finally:
        keeper.cancel()
        with suppress(asyncio.CancelledError):
            await keeper


async def _keep(ledger: Ledger, residency: Residency, config: WatchConfig) -> None:
    live = LiveOutcomes(ledger, config)
    while True:
        pause = config.every_s
        try:
            for pair, verdict in await asyncio.to_thread(live.look):
                await act(ledger, residency, pair, verdict, config)
        except ConflictError as exc:
            # Somebody switched at the same moment: the next look is at what serves now.
            log.info("the watch looks again: %s", exc)
            live.forget_verdicts()
        except NightschoolError as exc:
            log.error("the watch could not do its work, and tries again: %s", exc)
            live.forget_verdicts()
            pause = AGAIN_S
        except Exception:
            log.exception("the watch hit a bug, and goes on")
            live.forget_verdicts()
            pause = AGAIN_S
        await asyncio.sleep(pause)


async def act(
    ledger: Ledger, residency: Residency, pair: Watched, verdict: LiveVerdict, config: WatchConfig
) -> Promotion | None:
    """Roll back what proved worse, let a canary that stood its trial serve all; None when it is too early for either.

    EngineError when the old generation cannot be served; ConflictError when another switch came first.
    """
    if verdict.worse:
        why = f"rolled back: {verdict.told}"
        log.warning("generation %d: %s", pair.new, why)
        if pair.canary:
            done = {"expected": pair.new, "evidence": verdict.evidence}
            return promotion.end_canary(ledger, residency, why=why, by=BY, **done)
        done = {"expected_from": pair.new, "evidence": verdict.evidence}
        return await promotion.promote(ledger, residency, pair.old, why=why, by=BY, **done)
    if pair.canary and verdict.compared >= config.canary_outcomes:
        why = f"stood its trial in canary: {verdict.told}"
        log.info("generation %d %s", pair.new, why)
        # Loading takes a while, in which the operator may end the trial: then it has not been stood.
        as_judged = {"expected_from": pair.old, "expected_status": GenerationStatus.CANARY}
        return await promotion.promote(ledger, residency, pair.new, why=why, by=BY, **as_judged)
    return None


def standing(ledger: Ledger, config: WatchConfig, tenant: str | None = None) -> list[dict[str, Any]]:
    """What the watch would say now, for people to read; empty when no generation is on probation.

    `tenant`: only its workloads are named; None: everybody's.
    """
    if not config.enabled or not ledger.generations():
        return []
    return [
        {
            "generation": pair.new,
            "against": pair.old,
            "canary": pair.canary,
            "since": pair.since.isoformat(),
            "told": _told_to(tenant, verdict),
            "workloads": [
                {
                    "tenant": w.tenant,
                    "workload": w.name,
                    "old": w.old.model_dump(),
                    "new": w.new.model_dump(),
                    "evidence": w.verdict.evidence if w.verdict else None,
                }
                for w in verdict.workloads
                if tenant in (None, w.tenant)
            ],
        }
        for pair, verdict in LiveOutcomes(ledger, config).look()
    ]


def _told_to(tenant: str | None, verdict: LiveVerdict) -> str:
    if not verdict.worse or tenant in (None, verdict.evidence["tenant"]):
        return verdict.told
    return "proven worse in what another tenant asks; the operator sees in what"
