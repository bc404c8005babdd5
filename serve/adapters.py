"""Adapters in the engine: proved before they serve, under names that are never used twice.

Owns checking an adapter's files, loading, probing and unloading it, and `Residency`: which adapters are
loaded now, and by how many requests each is in use. Owns no promotion (`serve.promotion`) and no training.

A name holds the hash of the weights (`Generation.served_name`), so a name is never reloaded with other
weights: vLLM could answer from the old adapter's cached prefixes (vLLM #42125).
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from agent.llm import Endpoint
from memory.errors import EngineError
from memory.night_records import Generation
from serve.engine import BASE_NAME, EngineUnreachableError, request
from serve.models import file_sha256

log = logging.getLogger(__name__)

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

PROBES = (
    "The capital of France is Paris, and the capital of Italy is Rome.",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "Action: calc(3 * (4 + 5))\nObservation: 27\nAction: finish(27)",
)
MIN_DELTA = 1e-3
"""The largest log-prob difference over the probes that an adapter must make, in nats. An adapter that is
not applied makes none; batching alone made less than 2e-4 in float32."""

LOAD_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 900.0
ATTEMPTS = 3
"""Tries to bring an adapter in while the engine dies and comes back."""


@dataclass(frozen=True)
class Probe:
    """How an adapter's log-probs differ from the base model's over the probe prompts, in nats."""

    max_delta: float
    mean_delta: float
    tokens: int


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


async def probe(engine: Endpoint, name: str) -> Probe:
    """Prove that the adapter is applied: its log-probs must differ from the base model's.

    EngineError when they do not. (Adapters that bind to no module, or that a bug leaves out, serve the
    base model's answers and look healthy: vLLM #48019, verl #7495.)
    """
    base, adapted = await asyncio.gather(_logprobs(engine, BASE_NAME), _logprobs(engine, name))
    if len(base) != len(adapted):
        raise EngineError(f"the engine gave {len(adapted)} probe tokens for {name} and {len(base)} for the base model")
    deltas = [abs(a - b) for a, b in zip(adapted, base, strict=True)]
    result = Probe(max_delta=max(deltas), mean_delta=sum(deltas) / len(deltas), tokens=len(deltas))
    if not result.max_delta >= MIN_DELTA:
        raise EngineError(
            f"{name} is loaded but changes nothing (largest log-prob difference {result.max_delta:.1e} over "
            f"{result.tokens} tokens): its weights are empty or fit no module of the base model"
        )
    return result


async def _logprobs(engine: Endpoint, model: str) -> list[float]:
    """The log-probs of the probe prompts' own tokens, in order."""
    # Prompt log-probs, not generated ones: the same tokens on both sides, and never from the prefix cache.
    payload = {"model": model, "prompt": list(PROBES), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    reply = await request(
        engine, "POST", "/v1/completions", payload | {"return_token_ids": True}, timeout=LOAD_TIMEOUT_S
    )
    values: list[float] = []
    try:
        for choice in sorted(reply["choices"], key=lambda choice: choice["index"]):
            tokens = choice["prompt_token_ids"]
            for token, entry in list(zip(tokens, choice["prompt_logprobs"], strict=True))[1:]:
                values.append(float(entry[str(token)]["logprob"]))
    except (KeyError, TypeError, ValueError) as exc:
        raise EngineError(f"the engine gave no prompt log-probs for {model}: {type(exc).__name__} {exc}") from exc
    if not values:
        raise EngineError(f"the engine gave no prompt log-probs for {model}")
    return values


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

    def __init__(self, engine: Endpoint, root: Path, *, max_loras: int = 3) -> None:
        self._engine = engine
        self._root = root
        self._max = max_loras
        self._slots: dict[str, _Slot] = {}
        self._kept: set[str] = set()
        self._clock = 0
        self._changing = asyncio.Lock()
        self._released = asyncio.Condition()

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

    def keep(self, *generations: Generation) -> None:
        """Evict these last (champion and previous): a rollback then switches without a load."""
        self._kept = {generation.served_name for generation in generations}

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
        async with self._changing:
            slot = self._slots.pop(generation.served_name, None)
            if slot is not None:
                await self._released_when(lambda: not slot.users, f"{generation.served_name} is still in use")
                await unload(self._engine, generation.served_name)

    async def restore(self) -> None:
        """Put back what was resident, after the engine has started again.

        EngineError names the first adapter that could not be; it is no longer resident, the others are.
        """
        failed: EngineError | None = None
        async with self._changing:
            for name, slot in list(self._slots.items()):
                try:
                    slot.probe = await self._bring_in(slot.generation)
                except EngineError as exc:
                    log.warning("%s could not be put back: %s", name, exc)
                    self._slots.pop(name)
                    failed = failed or exc
        if failed is not None:
            raise failed

    async def _acquire(self, generation: Generation, users: int) -> _Slot:
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
        async with self._changing:
            if name not in self._slots:
                while len(self._slots) >= self._max:
                    await self._evict_one()
                self._slots[name] = _Slot(generation, probe=await self._bring_in(generation))
            return self._slots[name]

    async def _bring_in(self, generation: Generation) -> Probe:
        folder = await asyncio.to_thread(verify, generation, self._root)
        name = generation.served_name
        await load(self._engine, name, folder)
        try:
            return await probe(self._engine, name)
        except EngineError:
            await self._try_unload(name)
            raise

    async def _evict_one(self) -> None:
        await self._released_when(
            lambda: any(not slot.users for slot in self._slots.values()), "all adapters are in use"
        )
        idle = [name for name, slot in self._slots.items() if not slot.users]
        # What is kept goes last, but it goes: a request never waits for ever.
        name = min(idle, key=lambda name: (name in self._kept, self._slots[name].used_at))
        del self._slots[name]
        await unload(self._engine, name)

    async def _released_when(self, condition: Callable[[], bool], what: str) -> None:
        try:
            async with self._released:
                await asyncio.wait_for(self._released.wait_for(condition), DRAIN_TIMEOUT_S)
        except TimeoutError as exc:
            raise EngineError(f"{what} after {DRAIN_TIMEOUT_S:.0f} s: try again, or raise engine.max_loras") from exc

    async def _try_unload(self, name: str) -> None:
        try:
            await unload(self._engine, name)
        except EngineError as exc:
            log.warning("%s could not be unloaded: %s", name, exc)
