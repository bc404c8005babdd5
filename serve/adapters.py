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
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from agent.llm import Endpoint
from distill.train.proof import PROBES, Proof, read_proof
from memory.errors import EngineError
from memory.night_records import Generation
from serve.engine import EngineUnreachableError, request
from serve.engine_settings import BASE_NAME
from serve.models import file_sha256

log = logging.getLogger(__name__)

T = TypeVar("T")

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
UNSAFE = (".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt")

MIN_DELTA = 1e-3
"""The largest log-prob difference over the probes that an adapter must make, in nats, and with a proof the mean that
it made in training. One that is not applied makes none; batching alone made less than 2e-4 in float32."""
CLEARLY = 1.25
"""So many times the rounding an adapter's mean effect must be. SmolLM2-135M in bfloat16 against a proof in float32:
batching alone makes 0.1 times, an adapter of 0.04 nats 1.5 times. In float32 any effect is thousands of times."""

LOAD_TIMEOUT_S = 180.0
DRAIN_TIMEOUT_S = 600.0
READY_TIMEOUT_S = 900.0
ATTEMPTS = 3
"""Tries to bring an adapter in while the engine dies and comes back."""


@dataclass(frozen=True)
class Probe:
    """What the engine says of the probe prompts with the adapter, beside what it should say, in nats."""

    max_delta: float
    """From the base model: the largest difference at a token."""
    mean_delta: float
    tokens: int
    error: float | None = None
    """From the trainer's own figures: the mean difference. None: the adapter has no `proof.json`."""


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


async def probe(engine: Endpoint, name: str, proof: Proof | None = None, tolerance: float = 0.05) -> Probe:
    """Prove that the adapter is applied: its log-probs must differ from the base model's and, with the trainer's
    `proof`, be the ones that were trained, within `tolerance` nats on average.

    EngineError when they are not. (Adapters that bind to no module, or that a bug leaves out, serve the
    base model's answers and look healthy: vLLM #48019, verl #7495.)
    """
    prompts: list[Any] = list(PROBES) if proof is None else [row.token_ids for row in proof.rows]
    base, adapted = await asyncio.gather(_logprobs(engine, BASE_NAME, prompts), _logprobs(engine, name, prompts))
    if len(base) != len(adapted):
        raise EngineError(f"the engine gave {len(adapted)} probe tokens for {name} and {len(base)} for the base model")
    deltas = [abs(a - b) for a, b in zip(adapted, base, strict=True)]
    error = _compared(name, proof, base, adapted, tolerance) if proof is not None else None
    result = Probe(max(deltas), sum(deltas) / len(deltas), len(deltas), error)
    if not result.max_delta >= MIN_DELTA:
        raise EngineError(
            f"{name} is loaded but changes nothing (largest log-prob difference {result.max_delta:.1e} over "
            f"{result.tokens} tokens): its weights are empty or fit no module of the base model"
        )
    return result


def _compared(name: str, proof: Proof, base: list[float], adapted: list[float], tolerance: float) -> float:
    """The mean distance of the engine's log-probs from the trainer's; EngineError when it is none of rounding."""
    trained = [value for row in proof.rows for value in row.adapted]
    plain = [value for row in proof.rows for value in row.base]
    if len(trained) != len(adapted) or len(plain) != len(adapted):
        raise EngineError(f"the engine gave {len(adapted)} probe tokens for {name} and the trainer {len(trained)}")
    noise, error, effect = _distance(base, plain), _distance(adapted, trained), _distance(trained, plain)
    if not noise <= tolerance:
        raise EngineError(
            f"{name} was trained on another base model than the engine serves: without the adapter their log-probs "
            f"differ by {noise:.2g} nats on average, {tolerance:g} may come from rounding (engine.proof_tolerance)"
        )
    if not effect >= MIN_DELTA:
        raise EngineError(
            f"{name} changes nothing: the trainer itself found a difference of only {effect:.1e} nats on average"
        )
    # A weak adapter that is applied wrongly would pass inside the tolerance: rounding is no larger than it is without.
    allowed = min(tolerance, max(effect / 2, 2 * noise))
    if not error <= allowed:
        raise EngineError(
            f"{name} is not served as it was trained: its log-probs differ from the trainer's by {error:.2g} nats on "
            f"average, {allowed:.2g} may come from rounding (at most engine.proof_tolerance)"
        )
    # One that is not applied differs as well, by what two batches round differently.
    seen = _distance(adapted, base)
    if not seen > CLEARLY * noise:
        raise EngineError(
            f"{name} cannot be told from the base model: their log-probs differ by {seen:.2g} nats on average, and by "
            f"rounding alone {noise:.2g} (is engine.dtype another than the trainer's?)"
        )
    return error


def _distance(one: list[float], other: list[float]) -> float:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) / len(one)


async def _logprobs(engine: Endpoint, model: str, prompts: list[Any]) -> list[float]:
    """The log-probs of the probe prompts' own tokens, in order; the prompts are texts or token ids."""
    # Prompt log-probs, not generated ones: the same tokens on both sides, and never from the prefix cache.
    payload = {"model": model, "prompt": prompts, "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
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
        tolerance: float = 0.05,
        each: Each | None = None,
    ) -> None:
        """`each`: of the several engines that `engine` stands for (`serve.replicas`)."""
        self._engine = engine
        self._each = each or only(engine)
        self._root = root
        self._max = max_loras
        self._tolerance = tolerance
        self._slots: dict[str, _Slot] = {}
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
        await each(lambda engine: load(engine, name, folder))
        try:
            return (await each(lambda engine: probe(engine, name, proof, self._tolerance)))[0]
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
