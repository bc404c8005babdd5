"""`nightschool bench usefulness`: what the base model solves with no memory, all of it, and ours in several forms."""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from agent.run import ModelRef
from agent.state import AgentDeps
from evals.bench import BenchResult, Figure, result
from evals.labelled import PRINCIPLES
from evals.runner import evaluate
from evals.stats import paired_difference, wilson
from evals.suites import TRAINED_FAMILIES, Suite, reasoning_gym_suite, reasoning_gym_tasks
from memory.embed import load_embedder
from memory.index import Index, drain
from memory.ledger import Ledger
from memory.night_records import Evaluation
from memory.recall import Memory, Recall, RecallConfig, Recaller, estimate_tokens
from memory.records import MemoryStatus, PastRun, Principle, PrincipleKind, Task
from serve.settings import Settings

EngineOf = Callable[[Settings, Path], AbstractAsyncContextManager[tuple[Any, Path]]]
"""The real engine, running, with the base model's folder."""

FORMS = {
    "principle": RecallConfig(runs=0, principles=1),
    "two_principles": RecallConfig(runs=0, principles=2),
    "run_and_principle": RecallConfig(runs=1, principles=1),
    "two_runs": RecallConfig(runs=2, principles=0),
}
"""What `usefulness` shows the model instead of the settings' choice: which form helps which model is measured."""


class AllMemory:
    """A `Recaller` that recalls everything, whatever the question, as far as it fits."""

    def __init__(self, ledger: Ledger, tenant: str, token_budget: int) -> None:
        everything = [
            *ledger.principles(tenant, MemoryStatus.ACTIVE),
            *ledger.past_runs(tenant, MemoryStatus.ACTIVE),
        ]
        random.Random(0).shuffle(everything)  # what does not fit is of no kind in particular
        self._recall, left = Recall(), token_budget
        for item in everything:
            tokens = estimate_tokens(item)
            if tokens <= left:
                left -= tokens
                kept: list[Any] = self._recall.principles if isinstance(item, Principle) else self._recall.runs
                kept.append(item)

    def recall(self, task: Task, **_: Any) -> Recall:
        """The same for every task."""
        return self._recall


async def compare_memories(
    ledger: Ledger,
    ours: Recaller,
    suite: Suite,
    model: ModelRef,
    deps: AgentDeps,
    *,
    context: int,
    concurrency: int,
    forms: Mapping[str, Recaller] | None = None,
) -> dict[str, Figure]:
    """Held-out success without memory, with all of it and with what recall chooses, and the paired differences.

    `forms`: recallers that show other kinds of items than `ours`. `context`: tokens of prompt and answer together.
    Raises as `evals.runner.evaluate`.
    """
    # Room for the system prompt, the question and every turn; the estimate of an item's tokens is a rough one.
    room = max(0, int(0.8 * (context - 300 - deps.config.max_turns * deps.config.max_tokens)))
    arms: dict[str, Recaller | None] = {
        "none": None,
        "all": AllMemory(ledger, suite.tasks[0].task.tenant, room),
        "ours": ours,
        **(forms or {}),
    }
    done: dict[str, Evaluation] = {}
    for arm, recaller in arms.items():
        armed = deps if recaller is None else replace(deps, recaller=recaller)
        done[arm], _ = await evaluate(
            suite,
            model,
            armed,
            memory=recaller is not None,
            memory_watermark=ledger.memory_watermark(),
            concurrency=concurrency,
            on_progress=lambda _done, _total: None,
        )
    figures: dict[str, Figure] = {"tasks": len(suite.tasks), "items": ledger.count_active(), "context": context}
    for arm, evaluation in done.items():
        hits, n = sum(outcome.success for outcome in evaluation.outcomes), len(evaluation.outcomes)
        low, high = wilson(hits, n)
        figures[f"{arm}_success"] = f"{hits / n:.0%} [{low:.0%}, {high:.0%}] ({hits}/{n})"
        figures[f"{arm}_prompt_tokens_per_task"] = round(sum(o.prompt_tokens for o in evaluation.outcomes) / n)
        figures[f"{arm}_seconds"] = round(evaluation.seconds, 1)
    workloads = [outcome.workload for outcome in done["ours"].outcomes]
    for other in [arm for arm in arms if arm != "ours"]:
        theirs, mine = ([o.success for o in done[arm].outcomes] for arm in (other, "ours"))
        gain = paired_difference(theirs, mine, strata=workloads)
        figures[f"ours_over_{other}_points"] = round(gain.points, 1)
        figures[f"ours_over_{other}_interval"] = f"[{gain.low:+.1f}, {gain.high:+.1f}], p {gain.p_value:.3f}"
    return figures


def fill_memory(ledger: Ledger, taught: Sequence[Task]) -> None:
    """What a day of corrections leaves behind: a past run for each task that the oracle solves, and the principles."""
    from serve.days import correct_value

    for task in taught:
        if (better := correct_value(task)) is not None:
            messages = [{"role": "user", "content": task.question}, *better]
            ledger.add_past_run(PastRun(task_id=task.id, workload=task.workload, messages=messages))
    for workload in dict.fromkeys(task.workload for task in taught):
        ledger.add_principle(
            Principle(kind=PrincipleKind.GUIDING, workload=workload, text=PRINCIPLES[workload], sources=[])
        )


def usefulness(settings: Settings, engine: EngineOf, taught: int = 7, held_out: int = 12) -> BenchResult:
    """The base model on the real engine: no memory, all memory, and ours."""
    with tempfile.TemporaryDirectory() as folder:
        return asyncio.run(_usefulness(settings, engine, Path(folder), taught, held_out))


async def _usefulness(settings: Settings, engine: EngineOf, folder: Path, taught: int, held_out: int) -> BenchResult:
    from agent.engine_client import EngineClient

    tasks = reasoning_gym_tasks(TRAINED_FAMILIES, taught, 101, source="bench")
    known = frozenset(task.fingerprint for task in tasks)
    suite = reasoning_gym_suite(TRAINED_FAMILIES, held_out, 70_001, "held_out", "held_out", exclude=known)
    with ExitStack() as stack:
        ledger = Ledger.open(f"sqlite:///{folder / 'ledger.sqlite'}")
        stack.callback(ledger.close)
        fill_memory(ledger, tasks)
        index = Index.open(folder / "index", load_embedder(settings.embedder, folder / "embedder"))
        stack.callback(index.close)
        drain(ledger, index)
        async with engine(settings, folder) as (running, _base):
            llm = EngineClient(running, settings.llm)
            try:
                figures = await compare_memories(
                    ledger,
                    Memory(ledger, index, settings.recall),
                    suite,
                    ModelRef(0, "base"),
                    AgentDeps(llm=llm, config=settings.agent),
                    context=settings.engine.max_model_len,
                    concurrency=settings.night.concurrency,
                    forms={name: Memory(ledger, index, config) for name, config in FORMS.items()},
                )
            finally:
                await llm.close()
    return result("usefulness", figures, {"ours_over_none_points": "> 0", "ours_over_all_points": "> 0"})
