"""`nightschool bench agent`: what the agent costs the engine's throughput.

Each round sends a saturating load of new tasks to the service, then the very calls that its agent made, read off the
trajectories, straight to the same vLLM with the same sampling, grammar and number in flight. Both ways have a cache
salt of their own, so neither finds the other's prompts in vLLM's prefix cache.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from agent.llm import ChatRequest
from evals.bench import BenchResult, result
from memory.errors import EngineError
from memory.records import PastRun, Task, Trajectory
from serve.benches.front import Target, service
from serve.settings import Settings

T = TypeVar("T")
ROUNDS = 2
SEATS_CPU, SEATS_GPU = 32, 256
"""Requests that vLLM computes at once when the settings do not say."""

PAST_RUNS = 96
"""What memory holds, so that recall has something to search and to put into prompts."""

StartEngine = Callable[[Settings, Path], AbstractAsyncContextManager[tuple[Any, Path]]]


def agent(settings: Settings, start_engine: StartEngine, tasks: int | None = None) -> BenchResult:
    """Completion tokens per second through the agent over those of the same calls without it."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_measure(settings, start_engine, Path(folder), tasks))


async def _measure(settings: Settings, start_engine: StartEngine, folder: Path, tasks: int | None) -> BenchResult:
    import aiohttp

    in_flight = 2 * (settings.engine.max_num_seqs or (SEATS_GPU if settings.engine.device == "gpu" else SEATS_CPU))
    amount = tasks or 2 * in_flight
    legs: list[tuple[float, float]] = []
    calls = 0
    async with start_engine(settings, folder) as (engine, base), aiohttp.ClientSession(**_patient()) as http:
        straight = Target(int(engine.base_url.removesuffix("/v1").rpartition(":")[2]), "base", engine.api_key)
        await asyncio.to_thread(_remember, folder / "data")
        with ExitStack() as stack:
            door = await asyncio.to_thread(stack.enter_context, service(folder, straight, str(base)))
            for number in range(-1, ROUNDS):  # the first round warms up and is not counted
                asked = _tasks(amount if number >= 0 else in_flight, seed=100 + number)
                seconds, runs = await _agent_leg(http, door, asked, in_flight, folder / "data")
                tokens = sum(step.completion_tokens or 0 for run in runs for step in run.steps)
                sent = _calls(runs, settings)
                direct_s, direct_tokens = await _direct_leg(http, straight, sent, in_flight)
                if number >= 0:
                    legs.append((tokens / seconds, direct_tokens / direct_s))
                    calls += len(sent)
            await asyncio.to_thread(stack.close)
    figures = {
        "agent_tokens_per_s": round(median(a for a, _ in legs), 1),
        "direct_tokens_per_s": round(median(d for _, d in legs), 1),
        "agent_over_direct": round(median(a / d for a, d in legs), 3),
        "tasks": amount * ROUNDS,
        "calls": calls,
        "in_flight": in_flight,
        "rounds": ROUNDS,
    }
    return result("agent", figures, {"agent_over_direct": ">= 0.95"})


def _patient() -> dict[str, Any]:
    import aiohttp

    return {"timeout": aiohttp.ClientTimeout(total=1800), "connector": aiohttp.TCPConnector(limit=0)}


def _tasks(amount: int, seed: int) -> list[Task]:
    from evals.suites import TRAINED_FAMILIES, reasoning_gym_tasks

    each = -(-amount // len(TRAINED_FAMILIES))
    return reasoning_gym_tasks(TRAINED_FAMILIES, each, seed, source="bench")[:amount]


def _remember(data_dir: Path) -> None:
    from serve.demo import correct_value
    from serve.wiring import open_ledger

    ledger = open_ledger(Settings(data_dir=data_dir))
    try:
        for task in _tasks(PAST_RUNS, seed=7):
            better = correct_value(task)
            if better is not None:
                ledger.add_task(task)
                run = [{"role": "user", "content": task.question}, *better]
                ledger.add_past_run(PastRun(workload=task.workload, task_id=task.id, messages=run))
    finally:
        ledger.close()


async def _agent_leg(
    http: Any, door: Target, tasks: Sequence[Task], in_flight: int, data_dir: Path
) -> tuple[float, list[Trajectory]]:
    """Seconds, and the runs in the order in which they ended."""
    from serve.wiring import open_ledger

    ledger = await asyncio.to_thread(open_ledger, Settings(data_dir=data_dir))
    try:
        before = ledger.watermark()["trajectory"]
        seconds = await _through(http, door, tasks, in_flight)
        return seconds, ledger.trajectories(after_seq=before)
    finally:
        ledger.close()


async def _through(http: Any, door: Target, tasks: Sequence[Task], in_flight: int) -> float:
    def body(task: Task) -> dict[str, Any]:
        return {"model": "nightschool", "messages": task.messages, "nightschool": {"workload": task.workload}}

    started = time.perf_counter()
    await _at_once([lambda t=task: _post(http, door, body(t)) for task in tasks], in_flight)
    return time.perf_counter() - started


def _calls(runs: Sequence[Trajectory], settings: Settings) -> list[ChatRequest]:
    from agent.replay import model_calls

    return [call for run in runs for call in model_calls(run, settings.agent)]


async def _direct_leg(http: Any, straight: Target, calls: Sequence[ChatRequest], in_flight: int) -> tuple[float, int]:
    """Seconds and completion tokens."""

    def body(call: ChatRequest) -> dict[str, Any]:
        form = {"structured_outputs": {"regex": call.regex}} if call.regex else {}
        return {"model": call.model, "messages": call.messages, "cache_salt": "direct", **call.sampling, **form}

    started = time.perf_counter()
    replies = await _at_once([lambda c=call: _post(http, straight, body(c)) for call in calls], in_flight)
    return time.perf_counter() - started, sum(reply["usage"]["completion_tokens"] for reply in replies)


async def _at_once(acts: Sequence[Callable[[], Awaitable[T]]], limit: int) -> list[T]:
    seats = asyncio.Semaphore(limit)

    async def seated(act: Callable[[], Awaitable[T]]) -> T:
        async with seats:
            return await act()

    return await asyncio.gather(*(seated(act) for act in acts))


async def _post(http: Any, target: Target, body: dict[str, Any]) -> dict[str, Any]:
    url = f"http://127.0.0.1:{target.port}/v1/chat/completions"
    async with http.post(url, json=body, headers={"Authorization": f"Bearer {target.key}"}) as reply:
        if reply.status != 200:
            raise EngineError(f"{reply.status}: {(await reply.text())[:300]}")
        return await reply.json()
