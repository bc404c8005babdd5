"""The engine out of the trainer's way: where both share one GPU, it sleeps or stops while a night trains.

Owns the way there and back. What is asked meanwhile waits (`Engine.wait_ready`), up to `llm.timeout_s`. vLLM has lost
or mixed up LoRA weights in its sleep, so nothing is served before every resident adapter is proved again; an engine
that fails the proof is started anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any

from memory.errors import ConfigError, EngineError
from serve import durable
from serve.adapters import Residency
from serve.engine import Engine, request
from serve.replicas import Replicas
from serve.wiring import Services

log = logging.getLogger(__name__)

FALL_ASLEEP_S = 600.0
"""Longest wait for the running requests."""
WAKE_S = 300.0
NOT_OURS = "engine.during_training must be `share` with an engine of another service (engine.url)"


@contextmanager
def out_of_the_way(services: Services) -> Iterator[None]:
    """Free the accelerator for the block, as `engine.during_training` says; called from the night's thread.

    Raises ConfigError for an engine that is not ours to stop, EngineError when it cannot be put to sleep.
    """
    if services.settings.engine.during_training == "share":
        yield
        return
    engine = services.engine
    if isinstance(engine, Replicas):
        raise ConfigError(NOT_OURS)
    _on_loop(services, rest(engine))
    stops = False
    try:
        yield
    except durable.StoppedError:
        stops = True
        raise
    finally:
        # Also for a cancelled night: the engine must not stay asleep, unless it goes down with the service.
        if not stops:
            _on_loop(services, wake(engine, services.residency))


async def rest(engine: Engine) -> None:
    """Put the engine to sleep when its running requests have ended, or stop it: what that cuts off, the seam to the
    model asks again (`agent.llm.retrying`), and so it waits."""
    if engine.config.url is not None:
        raise ConfigError(NOT_OURS)
    if engine.config.during_training == "stop":
        await engine.stop()
        engine.status = "resting"
        return
    await engine.wait_ready()
    engine.status = "resting"
    try:
        # Level 1: the weights wait in the machine's memory, the KV cache is forgotten.
        await request(engine, "POST", "/sleep?level=1&mode=wait", timeout=FALL_ASLEEP_S)
    except EngineError:
        engine.status = "ready"
        raise


async def wake(engine: Engine, residency: Residency) -> None:
    """Bring the engine back with its adapters proved; it is starting again where sleep did it harm."""
    if engine.config.during_training == "sleep" and engine.status == "resting":
        try:
            await request(engine, "POST", "/wake_up", timeout=WAKE_S)
            await residency.restore()
        except EngineError as exc:
            log.warning("the engine did not come back from its sleep as it was, it is started anew: %s", exc)
            await engine.stop()
        else:
            engine.status = "ready"
    if engine.status in ("resting", "stopped"):
        # Its adapters are put back and proved before it is ready (`Engine.on_ready`).
        await engine.start()


def _on_loop(services: Services, work: Coroutine[Any, Any, None]) -> None:
    asyncio.run_coroutine_threadsafe(work, services.loop).result()
