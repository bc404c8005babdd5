"""Adapters in the engine: proved before they serve, under names that are never used twice.

Owns checking an adapter's files, loading and unloading it, and `Residency`: which adapters are
loaded now, and by how many requests each is in use. Owns no proof (`serve.proving`), no
promotion (`serve.promotion`) and no training.

A name holds the hash of the weights (`Generation.served_name`), so a name is never reloaded with other
weights: vLLM could answer from the old adapter's cached prefixes (vLLM #42125).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from agent.llm import Endpoint
from distill.train.proof import Proof, read_proof
from memory.errors import EngineError
from memory.night_records import Generation
from serve.engine import EngineUnreachableError, request
from serve.engine_settings import BASE_NAME
from serve.models import file_sha256
from serve.proving import Probe, probe

log = logging.getLogger(__name__)

T = TypeVar("T")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

LOAD_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 900.0
ATTEMPTS = 3
"""Tries to bring an adapter in while the engine dies and comes back."""


def adapter_sha256(folder: Path) -> str:
    """sha256 (hex) over the names and contents of the adapter's config and weights. EngineError when one is missing."""
    digest = hashlib.sha256()
    for name in ADAPTER_FILES:
        path = folder / name
        if not path.is_file():
            raise EngineError(f"{folder} holds no {name}: it is no PEFT adapter in safetensors")
        digest.update(f"{name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def verify(generation: Generation, registry_root: Path) -> Path:
    """The adapter's folder, proved to be the one that was trained.

    EngineError when it lies outside the registry, holds pickles (reading one runs its code), or has
    other bytes than the ledger says.
    """
    if generation.adapter_path is None or generation.adapter_sha256 is None:
        raise EngineError(f"generation {generation.number} has no adapter: it is the base model")
    root = registry_root.resolve()
    folder = (root / generation.adapter_path).resolve()
    if not folder.is_relative_to(root):
        raise EngineError(f"the adapter of generation {generation.number} lies outside {root}: it is not loaded")
    if not folder.is_dir():
        raise EngineError(
            f"the adapter of generation {generation.number} is gone from {folder}: restore it, or roll back"
        )
    for path in folder.rglob("*"):
        if path.suffix in UNSAFE or not path.resolve().is_relative_to(folder):
            raise EngineError(f"{path} may not be in an adapter's folder: only safetensors weights are loaded")
    found = adapter_sha256(folder)
    if found != generation.adapter_sha256:
        raise EngineError(
            f"the adapter of generation {generation.number} has changed on disk (sha256 {found[:12]}, "
            f"recorded {generation.adapter_sha256[:12]}): restore it, or roll back"
        )
    return folder


async def loaded(engine: Endpoint) -> set[str]:
    """Names of the adapters that the engine holds."""
    models = await request(engine, "GET", "/v1/models")
    return {card["id"] for card in models["data"]} - {BASE_NAME}


async def load(engine: Endpoint, name: str, folder: Path) -> None:
    """Load the adapter under `name`; done already when the engine holds that name. EngineError when refused."""
    if name in await loaded(engine):
        return
    payload = {"lora_name": name, "lora_path": str(folder)}
    await request(engine, "POST", "/v1/load_lora_adapter", payload, timeout=LOAD_TIMEOUT_S)


async def unload(engine: Endpoint, name: str) -> None:
    """Unload the adapter; requests under its name get 404 from now on. Done already when it is not loaded."""
    if name in await loaded(engine):
        await request(engine, "POST", "/v1/unload_lora_adapter", {"lora_name": name}, timeout=LOAD_TIMEOUT_S)


class Each(Protocol):
    """Does `act` at every engine that adapters are brought into; what it gave at each."""

    async def __call__(self, act: Callable[[Endpoint], Awaitable[T]]) -> list[T]: ...


def only(engine: Endpoint) -> Each:
    """That one engine."""

    async def each(act: Callable[[Endpoint], Awaitable[T]]) -> list[T]:
        return [await act(engine)]

    return each


@dataclass
class _Slot:
    generation: Generation
    users: int = 0
    used_at: int = 0
    probe: Probe | None = None


class Residency:
    """The adapters that are loaded, and who uses them. Belongs to one event loop.

    At most `max_loras` are resident. A further one takes the place of the least recently used adapter
    that no request uses and that is not kept (`keep`); when there is none, it waits for one.
    """

    def __init__(
        self,
        engine: Endpoint,
        root: Path,
        *,
        max_loras: int = 3,
        tolerance: float = 0.1,
        each: Each | None = None,
    ) -> None:
        """`each`: of the several engines that `engine` stands for (`serve.replicas`)."""
        self._engine = engine
        self._each = each or only(engine)
        self._root = root
        self._max = max_loras
        self._tolerance = tolerance
        self._slots: dict[str, _Slot] = {}
        self._proofs: dict[str, Proof] = {}
        self._kept: list[str] = []
        self._clock = 0
        self._changing = asyncio.Lock()
        self._released = asyncio.Condition()
        self._draining: set[asyncio.Task[None]] = set()

    @property
    def resident(self) -> list[str]:
        """Names of the loaded adapters, most recently used first."""
        return sorted(self._slots, key=lambda name: -self._slots[name].used_at)

    @property
    def swapping(self) -> bool:
        """An adapter is being loaded or unloaded now; requests for it wait."""
        return self._changing.locked()

    def in_flight(self, generation: Generation) -> int:
        """Requests that use the generation now; 0 for the base model, which is never unloaded."""
        slot = self._slots.get(generation.served_name)
        return slot.users if slot else 0

    def expect(self, *generations: Generation) -> None:
        """Before the engine starts: bring these in with it (`restore`), as many as there is room for, and keep them."""
        self.keep(*generations)
        for generation in [g for g in generations if g.adapter_sha256 is not None][: self._max]:
            self._slots[generation.served_name] = _Slot(generation)

    def keep(self, *generations: Generation) -> None:
        """Evict these last, the first of them very last (champion, previous): a rollback then needs no load."""
        self._kept = [generation.served_name for generation in generations]

    def settle(self, *generations: Generation) -> None:
        """`keep` these after a switch, and unload the others once their last request has ended."""
        self.keep(*generations)
        for name in self._slots.keys() - self._kept:
            task = asyncio.create_task(self._unload_idle(name))
            self._draining.add(task)
            task.add_done_callback(self._draining.discard)

    async def ensure(self, generation: Generation) -> Probe | None:
        """Make the generation servable: files checked, loaded, proved. None for the base model.

        EngineError when it cannot be served, or when every place stays in use.
        """
        if generation.adapter_sha256 is None:
            return None
        return (await self._acquire(generation, users=0)).probe

    @asynccontextmanager
    async def using(self, generation: Generation) -> AsyncIterator[None]:
        """Hold the generation for one request: it stays loaded until the block ends."""
        if generation.adapter_sha256 is None:
            yield
            return
        slot = await self._acquire(generation, users=1)
        try:
            yield
        finally:
            slot.users -= 1
            async with self._released:
                self._released.notify_all()

    async def drop(self, generation: Generation) -> None:
        """Unload the generation once its last request has ended; new ones load it again."""
        name = generation.served_name
        while name in self._slots:
            # Waited for without the lock: meanwhile a switch or a rollback may load.
            await self._released_when(lambda: not self._users(name), f"{name} is still in use")
            async with self._changing:
                if not self._users(name) and self._slots.pop(name, None) is not None:
                    await self._unload(name)

    async def restore(self) -> None:
        """Put back what was resident, after the engine has started again.

        EngineError names the first adapter that could not be; it is no longer resident, the others are.
        """
        failed: EngineError | None = None
        async with self._changing:
            for name, slot in list(self._slots.items()):
                try:
                    slot.probe = await self._bring_in(slot.generation, self._each)
                except EngineError as exc:
                    log.warning("%s could not be put back: %s", name, exc)
                    self._slots.pop(name)
                    failed = failed or exc
        if failed is not None:
            raise failed

    async def restore_at(self, engine: Endpoint) -> None:
        """Put what is resident into one engine, before it joins the others. EngineError: it may not serve."""
        async with self._changing:
            for slot in self._slots.values():
                slot.probe = await self._bring_in(slot.generation, only(engine))

    def _users(self, name: str) -> int:
        slot = self._slots.get(name)
        return slot.users if slot else 0

    async def _unload_idle(self, name: str) -> None:
        """`drop` behind a switch, unless the generation is wanted again meanwhile."""
        slot = self._slots.get(name)
        try:
            await self._released_when(lambda: not self._users(name) or name in self._kept, f"{name} is still in use")
            async with self._changing:
                if slot is self._slots.get(name) and slot is not None and not slot.users and name not in self._kept:
                    del self._slots[name]
                    await self._unload(name)
        except EngineError as exc:
            log.warning("%s stays loaded: %s", name, exc)

    async def _acquire(self, generation: Generation, users: int) -> _Slot:
        slot = self._slots.get(generation.served_name)
        if slot is not None and slot.probe is None:
            # Expected with the engine's start, which is not over: it serves nothing unproved.
            await self._engine.wait_ready(READY_TIMEOUT_S)
            slot = self._slots.get(generation.served_name)
        for attempt in range(ATTEMPTS):
            if slot is not None:
                break
            # Before the lock: an engine that starts again needs it for `restore`.
            await self._engine.wait_ready(READY_TIMEOUT_S)
            try:
                slot = await self._admit(generation)
            except EngineUnreachableError:
                if attempt == ATTEMPTS - 1:
                    raise
        assert slot is not None
        # No await from here to the caller's block: nobody can evict it before its use is counted.
        self._clock += 1
        slot.used_at = self._clock
        slot.users += users
        return slot

    async def _admit(self, generation: Generation) -> _Slot:
        name = generation.served_name
        while True:
            # Waited for without the lock: an engine that starts again needs it for `restore`, and until it has, those
            # who hold the places do not end.
            await self._released_when(lambda: name in self._slots or self._may_place(), "all adapters are in use")
            async with self._changing:
                if name not in self._slots and self._may_place():
                    if len(self._slots) >= self._max:
                        await self._evict_one()
                    self._slots[name] = _Slot(generation, probe=await self._bring_in(generation, self._each))
                if name in self._slots:
                    return self._slots[name]

    def _may_place(self) -> bool:
        """Whether there is a place for a further adapter, or one whose adapter nobody uses."""
        return len(self._slots) < self._max or any(not slot.users for slot in self._slots.values())

    async def _bring_in(self, generation: Generation, each: Each) -> Probe:
        folder = await asyncio.to_thread(verify, generation, self._root)
        proof = await asyncio.to_thread(read_proof, folder)
        name = generation.served_name
        if proof is None:
            log.warning("%s has no proof.json (an older trainer's): proved is only that it changes the answers", name)
        # Those seen so far: an engine that mixes adapters up answers as one of them.
        others = {known: its for known, its in self._proofs.items() if known != name}
        if proof is not None:
            self._proofs[name] = proof
        await each(lambda engine: load(engine, name, folder))
        try:
            return (await each(lambda engine: probe(engine, name, proof, self._tolerance, others)))[0]
        except EngineError:
            await self._try_unload(name, each)
            raise

    async def _evict_one(self) -> None:
        idle = [name for name, slot in self._slots.items() if not slot.users]
        # What is kept goes last, but it goes: a request never waits for ever.
        last = [*reversed(self._kept)]
        name = min(idle, key=lambda name: (last.index(name) if name in last else -1, self._slots[name].used_at))
        del self._slots[name]
        await self._unload(name)

    async def _released_when(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with asyncio.timeout(DRAIN_TIMEOUT_S), self._released:
                await self._released.wait_for(condition)
        except TimeoutError as exc:
            raise EngineError(f"{what} after {DRAIN_TIMEOUT_S:.0f} s: try again, or raise engine.max_loras") from exc

    async def _unload(self, name: str) -> None:
        await self._each(lambda engine: unload(engine, name))

    async def _try_unload(self, name: str, each: Each) -> None:
        try:
            await each(lambda engine: unload(engine, name))
        except EngineError as exc:
            log.warning("%s could not be unloaded: %s", name, exc)
