"""`nightschool bench swap`: what a hot-load costs, whether switches under load are noticed, how soon a rollback serves,
and how soon the watch does one.

Clients ask without a pause while the champion changes; three adapters take turns, so every switch loads, proves and
unloads one. Who really answered is read off the log-probs that came with the reply's tokens: they are computed again
under each adapter, and must be those of the generation that the reply names.
"""

from __future__ import annotations

import asyncio
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import cycle, islice
from pathlib import Path
from statistics import median, quantiles
from typing import TYPE_CHECKING, Any

from evals.bench import BenchResult, result
from evals.live import WatchConfig
from memory.errors import EngineError
from memory.ledger import Ledger
from memory.night_records import Generation, GenerationStatus
from memory.records import Outcome, OutcomeSource, Step, StopReason, Task, Trajectory, new_id
from serve import watching
from serve.engine import ROOT, request
from serve.settings import Settings

if TYPE_CHECKING:
    import httpx

    from serve.wiring import Services

SWAPS, CLIENTS, ADAPTERS = 20, 16, 3
TOKENS = 8
STALLED_S = 300.0
QUESTIONS = ("What is the capital of France?", "Name a colour.", "Count to five.", "Who wrote Hamlet?")


@dataclass(frozen=True)
class Answered:
    """A reply, and whom it names."""

    run_id: str
    generation: int
    text: str
    started: float
    seconds: float


@dataclass
class Load:
    """What clients and switches met."""

    answered: list[Answered] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)
    swap_s: list[float] = field(default_factory=list)


@asynccontextmanager
async def clients(http: httpx.AsyncClient, body: Callable[[int], dict[str, Any]]) -> AsyncIterator[Load]:
    """16 clients who ask without a pause for as long as the block lasts. `body` is the request of the n-th reply."""
    load, over = Load(), asyncio.Event()

    async def client(first: int) -> None:
        n = first
        while not over.is_set():
            started = time.perf_counter()
            reply = await http.post("/v1/chat/completions", json=body(n))
            n += CLIENTS
            if reply.status_code != 200:
                load.failed.append(f"{reply.status_code}: {reply.text[:300]}")
                continue
            said = reply.json()
            told, text = said["nightschool"], said["choices"][0]["message"]["content"]
            run = said["id"].removeprefix("chatcmpl-")
            load.answered.append(Answered(run, told["generation"], text, started, time.perf_counter() - started))

    asking = [asyncio.create_task(client(n)) for n in range(CLIENTS)]
    try:
        yield load
    finally:
        over.set()
        await asyncio.gather(*asking)


async def under_load(
    http: httpx.AsyncClient, order: Sequence[int], body: Callable[[int], dict[str, Any]], between: int = CLIENTS
) -> Load:
    """Promote the generations in `order`, `between` replies apart, while the clients ask.

    EngineError when a switch fails or nothing is answered any more.
    """
    async with clients(http, body) as load:
        for number in order:
            await _replies(load, between)
            load.swap_s.append(await _promoted(http, number))
        await _replies(load, between)
    return load


async def _replies(load: Load, more: int) -> None:
    wanted = len(load.answered) + len(load.failed) + more
    await _until(lambda: len(load.answered) + len(load.failed) >= wanted, "no reply")


async def _until(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + STALLED_S
    while not condition():
        if time.monotonic() > deadline:
            raise EngineError(f"{otherwise} within {STALLED_S:.0f} s")
        await asyncio.sleep(0.01)


async def _promoted(http: httpx.AsyncClient, number: int) -> float:
    """Seconds that it took to make the generation champion."""
    started = time.perf_counter()
    done = await http.post(f"/v1/generations/{number}/promote", json={"why": "bench"})
    if done.status_code != 200:
        raise EngineError(f"generation {number} could not be promoted: {done.text[:300]}")
    return time.perf_counter() - started


async def rolled_back(http: httpx.AsyncClient, body: dict[str, Any]) -> float:
    """Seconds from a rollback to a reply of the generation before. EngineError when that does not answer."""
    started = time.perf_counter()
    done = await http.post("/v1/generations/rollback", json={"why": "bench"})
    reply = await http.post("/v1/chat/completions", json=body)
    seconds = time.perf_counter() - started
    if {done.status_code, reply.status_code} != {200}:
        raise EngineError(f"no reply after a rollback: {done.text[:300]} {reply.text[:300]}")
    if reply.json()["nightschool"]["generation"] != done.json()["to_generation"]:
        raise EngineError(f"after a rollback to generation {done.json()['to_generation']} another answered")
    return seconds


async def rolled_back_by_the_watch(
    http: httpx.AsyncClient, ledger: Ledger, number: int, body: Callable[[int], dict[str, Any]], config: WatchConfig
) -> tuple[float, float, Load]:
    """Seconds from when the outcome is committed that proves generation `number` worse than the champion until the log
    has its rollback, and until a request made since is answered by the champion before; with what the clients met. The
    watch must be running.

    EngineError when nothing comes of it.
    """
    old = ledger.champion().number
    await asyncio.to_thread(_live, ledger, old, 2 * config.min_outcomes, True)
    async with clients(http, body) as load:
        await _promoted(http, number)
        await asyncio.to_thread(_live, ledger, number, config.min_outcomes - 1, False)
        await _replies(load, CLIENTS)
        started = time.perf_counter()
        await asyncio.to_thread(_live, ledger, number, 1, False)
        await _until(lambda: ledger.promotions()[-1].by == watching.BY, f"generation {number} was not rolled back")
        switched = time.perf_counter() - started

        def back() -> list[float]:
            since = [r for r in load.answered if r.started >= started and r.generation == old]
            return [r.started + r.seconds - started for r in since]

        await _until(lambda: bool(back()), f"no reply of generation {old}")
        first = min(back())
    return switched, first, load


def _live(ledger: Ledger, number: int, n: int, success: bool) -> None:
    """So many runs of the generation, as if they had been served and judged by a verifier."""
    name = ledger.generation(number).served_name
    for _ in range(n):
        task = Task(workload="bench", messages=[{"role": "user", "content": f"What is {new_id('n')}?"}])
        run = Trajectory(
            task_id=task.id,
            workload=task.workload,
            generation=number,
            model=name,
            messages=task.messages,
            stop_reason=StopReason.ANSWER,
            outcome=Outcome(score=float(success), by=OutcomeSource.VERIFIER),
        )
        ledger.add_run(task, run)


def swap(settings: Settings) -> BenchResult:
    """Seconds of each step of a hot-load alone; then switches under load, replies that failed or came from another
    generation than the one they name; then a rollback without load, and one by the watch under load."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(settings, Path(folder)))


async def _measure(settings: Settings, folder: Path) -> BenchResult:
    import httpx

    from serve.api.app import create_app
    from serve.night import NightSchool
    from serve.settings import ServerConfig
    from serve.wiring import build

    server = ServerConfig(keys=False, max_concurrent=CLIENTS)
    watch = WatchConfig()
    settings = settings.model_copy(update={"data_dir": folder / "data", "server": server, "watch": watch})
    async with build(settings, print) as services:
        made = await asyncio.to_thread(_adapters, services)
        await services.engine.wait_ready(900)
        figures = await _alone(services, made)
        app = create_app(services, NightSchool(services))
        transport = httpx.ASGITransport(app)  # pyright: ignore[reportArgumentType]
        async with httpx.AsyncClient(transport=transport, base_url="http://bench", timeout=STALLED_S) as http:
            load = await under_load(
                http, list(islice(cycle(range(1, ADAPTERS + 1)), SWAPS)), _asked, between=CLIENTS // 2
            )
            back = await rolled_back(http, _asked(0) | {"max_tokens": 1})
            left = services.ledger.promotions()[-1].from_generation
            async with watching.kept(services):
                by_watch, answered, met = await rolled_back_by_the_watch(http, services.ledger, left, _asked, watch)
        foreign, margin = await _foreign(services, load.answered, made)
    seconds = [reply.seconds for reply in load.answered]
    figures |= {
        "swaps": len(load.swap_s),
        "clients": CLIENTS,
        "replies": len(load.answered),
        "failed": len(load.failed) + len(met.failed),
        "from_another_generation": foreign,
        "told_apart_by_nats": round(margin, 2),
        "switch_p50_s": round(median(load.swap_s), 2),
        "switch_max_s": round(max(load.swap_s), 2),
        "reply_p50_s": round(median(seconds), 2),
        "reply_p95_s": round(quantiles(seconds, n=20)[-1], 2),
        "rollback_s": round(back, 2),
        "watch_rollback_s": round(by_watch, 2),
        "watch_reply_s": round(answered, 2),
    }
    aims = {
        "swaps": f">= {SWAPS}",
        "failed": "== 0",
        "from_another_generation": "== 0",
        "rollback_s": "<= 1",
        "watch_rollback_s": "<= 1",
    }
    return result("swap", figures, aims)


def _asked(n: int) -> dict[str, Any]:
    said = [{"role": "user", "content": QUESTIONS[n % len(QUESTIONS)]}]
    return {"model": "champion", "messages": said, "max_tokens": TOKENS, "temperature": 0, "logprobs": True}


async def _alone(services: Services, made: Sequence[Generation]) -> dict[str, Any]:
    """Median seconds of load, proof and unload on an idle engine, and how near the engine comes to PEFT."""
    from distill.train.proof import read_proof
    from serve import adapters, proving

    seconds: dict[str, list[float]] = {"load": [], "probe": [], "unload": []}
    errors, deltas = [], []
    for generation in made:
        path = services.settings.adapters_dir / str(generation.adapter_path)
        proof, name = read_proof(path), generation.served_name
        for step, act in (
            ("load", lambda n=name, p=path: adapters.load(services.engine, n, p)),
            ("probe", lambda n=name, p=proof: proving.probe(services.engine, n, p, tolerance=100.0)),
            ("unload", lambda n=name: adapters.unload(services.engine, n)),
        ):
            started = time.perf_counter()
            found = await act()
            seconds[step].append(time.perf_counter() - started)
            if isinstance(found, proving.Probe):
                errors.append(found.error or 0.0)
                deltas.append(found.mean_delta)
    figures: dict[str, Any] = {f"{name}_s": round(median(values), 3) for name, values in seconds.items()}
    return figures | {"proof_error_max_nats": max(errors), "base_delta_min_nats": min(deltas)}


async def _foreign(services: Services, answered: Sequence[Answered], made: Sequence[Generation]) -> tuple[int, float]:
    """Replies whose log-probs are another generation's, and by how many nats the nearest other one was off at least."""
    steps: dict[str, Step] = {}
    for reply in answered:
        steps[reply.run_id] = services.ledger.get_trajectory(reply.run_id).steps[-1]
    sequences = sorted({_tokens(step) for step in steps.values()})
    known: dict[tuple[int, tuple[int, ...]], list[float]] = {}
    for generation in [services.ledger.generation(0), *made]:
        async with services.residency.using(generation):
            for tokens in sequences:
                known[generation.number, tokens] = await _scored(services, generation.served_name, tokens)
    foreign, margin = 0, float("inf")
    for reply in answered:
        step = steps[reply.run_id]
        said = [entry["logprob"] for entry in step.logprobs or []]
        off = {
            number: sum(abs(a - b) for a, b in zip(said, values[-len(said) :], strict=True))
            for (number, tokens), values in known.items()
            if tokens == _tokens(step)
        }
        named = off.pop(reply.generation)
        foreign += named >= min(off.values())
        margin = min(margin, min(off.values()) - named)
    return foreign, margin


def _tokens(step: Step) -> tuple[int, ...]:
    return tuple([*(step.prompt_token_ids or []), *(step.token_ids or [])])


async def _scored(services: Services, name: str, tokens: Sequence[int]) -> list[float]:
    asked = {"model": name, "prompt": list(tokens), "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
    reply = await request(services.engine, "POST", "/v1/completions", asked, timeout=STALLED_S)
    entries = reply["choices"][0]["prompt_logprobs"][1:]
    return [float(entry[str(token)]["logprob"]) for token, entry in zip(tokens[1:], entries, strict=True)]


def _adapters(services: Services) -> list[Generation]:
    """Generations whose adapters change every answer, with their proofs, made in the trainer's interpreter."""
    from serve.adapters import adapter_sha256

    settings, numbers = services.settings, range(1, ADAPTERS + 1)
    folders = [settings.adapters_dir / f"bench-{number}" for number in numbers]
    script = (
        "import sys, torch\n"
        "from pathlib import Path\n"
        "from peft import LoraConfig, get_peft_model\n"
        "from transformers import AutoModelForCausalLM\n"
        "from distill.train.proof import write_proof\n"
        "base, *folders = map(Path, sys.argv[1:])\n"
        f"config = LoraConfig(r={settings.train.rank}, lora_alpha={settings.train.alpha},\n"
        "    target_modules='all-linear', task_type='CAUSAL_LM')\n"
        "for number, folder in enumerate(folders):\n"
        "    torch.manual_seed(number)\n"
        "    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), config)\n"
        "    for part, weight in model.named_parameters():\n"
        "        if 'lora_B' in part:\n"
        "            torch.nn.init.normal_(weight, std=0.02)\n"
        "    model.save_pretrained(folder)\n"
        "    write_proof(base, folder)\n"
    )
    arguments = [str(settings.trainer_python), "-c", script, str(services.base_model), *map(str, folders)]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise EngineError(f"no adapters to switch between: {done.stderr.strip().splitlines()[-1]}")
    made = [
        Generation(
            number=number,
            parent=0,
            base_model=settings.model,
            adapter_path=folder.name,
            adapter_sha256=adapter_sha256(folder),
            status=GenerationStatus.CANDIDATE,
        )
        for number, folder in zip(numbers, folders, strict=True)
    ]
    for generation in made:
        services.ledger.add_generation(generation)
    return made
