"""Adapters that no night made, examined on one engine by the runner that serves nights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evals.suites import Suite
from memory.night_records import Evaluation
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.engine import Engine


async def examine(
    settings: Settings, engine: Engine, name: str, adapter: Path, suites: Sequence[Suite]
) -> list[Evaluation]:
    """An adapter on every suite, without memory; loaded as `name` for as long as that takes."""
    from agent.engine_client import EngineClient
    from agent.run import AgentDeps, ModelRef
    from evals.runner import evaluate
    from serve import adapters

    await adapters.load(engine, name, adapter)
    llm = EngineClient(engine, settings.llm)
    try:
        return [
            (
                await evaluate(
                    suite,
                    ModelRef(1, name),
                    AgentDeps(llm=llm, config=settings.agent),
                    memory=False,
                    memory_watermark="",
                    concurrency=settings.night.concurrency,
                    on_progress=lambda _done, _total: None,
                )
            )[0]
            for suite in suites
        ]
    finally:
        await llm.close()
        await adapters.unload(engine, name)


def exams_of(evaluations: Sequence[Evaluation]) -> dict[str, tuple[int, int]]:
    """Successes and tasks by suite, held-out suites together as `held out`."""
    found: dict[str, tuple[int, int]] = {}
    for evaluation in evaluations:
        name = "held out" if evaluation.role == "held_out" else evaluation.suite
        hits, n = found.get(name, (0, 0))
        found[name] = (hits + sum(o.success for o in evaluation.outcomes), n + len(evaluation.outcomes))
    return found


def rate(count: tuple[int, int]) -> float:
    """Success in 0..1; 0 where nothing was asked."""
    return count[0] / count[1] if count[1] else 0.0
