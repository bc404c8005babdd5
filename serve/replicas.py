"""Several external vLLMs that serve the same model, as one engine: which of them a request goes to, which may serve.

Owns the rotation: a replica is in it once every resident adapter has been put into it and proved, and leaves it when it
stops answering. Adapters are `serve.adapters`', the bytes on the wire `agent.engine_client`'s.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import aclosing
from pathlib import Path
from typing import TypeVar

from agent.engine_client import EngineClient, translate
from agent.llm import ChatReply, ChatRequest, Endpoint, LLMConfig, retrying
from memory.errors import EngineError, ModelError, ModelUnavailableError
from serve.adapters import loaded
from serve.engine import Engine, EngineUnreachableError, Status
from serve.engine_settings import BASE_NAME, EngineConfig

log = logging.getLogger(__name__)

T = TypeVar("T")

HOPEFUL_FIRST: tuple[Status, ...] = ("ready", "restarting", "starting", "stopped", "failed")
CLEARLY_BUSIER = 2
"""Requests more than the least busy has, up to which a prompt goes where its beginning is cached. Not measured."""


class Replica(Engine):
    """One of them, watched without end: `ready` in the rotation, `failed` when it may not serve or is long gone. It
    serves nothing before `on_ready` went through."""

    requests = 0
    """What it computes now."""

    async def has_lost(self, model: str) -> bool:
        """Whether it does not hold a resident adapter (any more): it started again unnoticed, and must prove all."""
        if model == BASE_NAME:
            return False
        try:
            if model in await loaded(self):
                return False
        except EngineError:
            pass
        self.leave("restarting", f"it does not hold {model}")
        return True

    def leave(self, status: Status, why: str) -> None:
        """Out of the rotation, to come back by itself."""
        self.status = status
        if why != self._why_failed:
            log.warning("%s gets no requests: %s", self.base_url, why)
        self._why_failed = why

    async def _attach(self) -> None:
        answered = time.monotonic()
        while True:
            try:
                await self._find_model()
                answered = time.monotonic()
                if self.status != "ready":
                    if self.on_ready is not None:
                        await self.on_ready()
                    # No await since: an adapter that is brought in next must find this replica in the rotation.
                    self.status, self._why_failed = "ready", ""
                    log.info("%s serves", self.base_url)
            except (EngineError, KeyError, TypeError, OSError) as exc:
                patience = self.config.start_timeout_s - (time.monotonic() - answered)
                away = isinstance(exc, EngineUnreachableError) and patience > 0
                self.leave("restarting" if away else "failed", str(exc) or repr(exc))
            await asyncio.sleep(self.config.health_every_s)


class Replicas:
    """The engines of `config.urls`, as `serve.engine.Engine` is one. All methods belong to the event loop that called
    `start`; the properties and `wait_ready` may be used from any loop."""

    def __init__(self, config: EngineConfig, *, model: Path, data_dir: Path) -> None:
        self.name = f"{len(config.urls)} vllm at {', '.join(config.urls)}"
        self.all = [
            Replica(config.model_copy(update={"url": url}), model=model, data_dir=data_dir) for url in config.urls
        ]

    @property
    def ready(self) -> list[Replica]:
        """The rotation."""
        return [replica for replica in self.all if replica.status == "ready"]

    @property
    def status(self) -> Status:
        """`ready` while one is; `failed` when there is none left to wait for."""
        standing: list[Status] = [replica.status for replica in self.all]
        return min(standing, key=HOPEFUL_FIRST.index)

    @property
    def base_url(self) -> str:
        """Of one that is ready, for a call that may go to any."""
        return next(iter(self.ready), self.all[0]).base_url

    @property
    def api_key(self) -> str:
        return self.all[0].api_key

    async def start(self) -> None:
        """Begin to watch them; returns at once (see `wait_ready`)."""
        for replica in self.all:
            await replica.start()

    async def stop(self) -> None:
        """Watch them no longer; they go on."""
        for replica in self.all:
            await replica.stop()

    async def wait_ready(self, timeout: float) -> None:
        """Return once one can be called. EngineError when none may serve or it takes too long."""
        deadline = time.monotonic() + timeout
        while (status := self.status) != "ready":
            if status in ("failed", "stopped"):
                raise EngineError("none of the engines may serve; the service's log says why of each")
            if time.monotonic() > deadline:
                raise EngineError(f"none of the engines is ready after {timeout:.0f} s")
            await asyncio.sleep(0.05)

    async def each(self, act: Callable[[Endpoint], Awaitable[T]]) -> list[T]:
        """What `act` gives at every ready replica. One that stops answering leaves the rotation and is left out.

        EngineError: the first refusal, with the replica's URL. EngineUnreachableError: none answers.
        """
        asked = self.ready
        found = await asyncio.gather(*(act(replica) for replica in asked), return_exceptions=True)
        given: list[T] = []
        refused: list[EngineError] = []
        for replica, one in zip(asked, found, strict=True):
            if isinstance(one, EngineUnreachableError):
                replica.leave("restarting", str(one))
            elif isinstance(one, EngineError):
                refused.append(EngineError(f"{replica.base_url}: {one}"))
            elif isinstance(one, BaseException):
                raise one
            else:
                given.append(one)
        if refused:
            raise refused[0]
        if not given:
            raise EngineUnreachableError("none of the engines answers")
        return given

    def choose(self, request: ChatRequest, tried: Collection[Replica] = ()) -> Replica | None:
        """The ready replica for a request, without those that were `tried`; None when there is none.

        Always the same for one beginning of a prompt, where the prefix cache has it: the model and the first two
        messages (instructions and question), which all turns of a run share. Unless it is clearly busier than another.
        """
        ready = [replica for replica in self.ready if replica not in tried]
        if not ready:
            return None
        beginning = (request.model, request.cache_salt, str(request.messages[:2]))
        home = max(ready, key=lambda replica: hash((beginning, replica.base_url)))
        idlest = min(ready, key=lambda replica: replica.requests)
        return home if home.requests <= idlest.requests + CLEARLY_BUSIER else idlest


class ReplicasClient:
    """A `ChatModel` over replicas, each with an `EngineClient` of its own."""

    def __init__(self, replicas: Replicas, config: LLMConfig | None = None) -> None:
        self._replicas = replicas
        self._config = config or LLMConfig()
        # The tries are counted here, over all of them.
        once = self._config.model_copy(update={"attempts": 1})
        self._clients = {replica: EngineClient(replica, once) for replica in replicas.all}

    async def complete(self, request: ChatRequest) -> ChatReply:
        replica, reply = await self._answered(request, lambda client: client.complete(request))
        replica.requests -= 1
        return reply

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        async def begun(client: EngineClient) -> tuple[AsyncIterator[str | ChatReply], str | ChatReply]:
            pieces = client.stream(request)
            return pieces, await anext(pieces)

        replica, (pieces, first) = await self._answered(request, begun)
        try:
            async with aclosing(pieces):  # pyright: ignore[reportArgumentType]
                yield first
                async for piece in pieces:
                    yield piece
        finally:
            replica.requests -= 1

    async def close(self) -> None:
        """Close the kept connections."""
        for client in self._clients.values():
            await client.close()

    async def _answered(self, request: ChatRequest, call: Callable[[EngineClient], Awaitable[T]]) -> tuple[Replica, T]:
        """What `call` gives at the replica that is chosen, or at another where that one is away or too busy. It stays
        counted among the replica's requests. ModelError when there is nothing after all retries."""

        async def attempt() -> tuple[Replica, T]:
            await self._replicas.wait_ready(self._config.timeout_s)
            tried: set[Replica] = set()
            said = "no engine is ready"
            while (replica := self._replicas.choose(request, tried)) is not None:
                tried.add(replica)
                replica.requests += 1
                try:
                    return replica, await call(self._clients[replica])
                except BaseException as exc:
                    replica.requests -= 1
                    away = isinstance(exc, ModelUnavailableError)
                    if not away and not (isinstance(exc, ModelError) and await replica.has_lost(request.model)):
                        raise
                    said = str(exc)
            raise ModelUnavailableError(said)

        return await retrying(self._config, attempt, translate)
