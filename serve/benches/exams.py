"""What the learning benches examine and how it is told: an arm's scores, and adapters that no night made."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from evals.bench import Figure
from evals.stats import wilson
from evals.suites import Suite
from memory.night_records import Evaluation
from serve.settings import Settings

if TYPE_CHECKING:
    from serve.engine import Engine


class Scores(BaseModel):
    """What one arm came to: successes and tasks by exam (`held out`, `held out, no memory`, each control suite)."""

    model_config = ConfigDict(frozen=True)

    arm: str
    verdict: str
    corrections: int
    rows: int
    exams: dict[str, tuple[int, int]]


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


def told(scores: Scores) -> dict[str, Figure]:
    """An arm's figures: one line for each exam."""
    found: dict[str, Figure] = {}
    for exam, (hits, n) in scores.exams.items():
        low, high = wilson(hits, n)
        found[f"{scores.arm}: {exam}"] = f"{hits / max(n, 1):.0%} [{low:.0%}, {high:.0%}] ({hits}/{n})"
    found[f"{scores.arm}: gate"] = f"{scores.verdict}; {scores.corrections} corrections, {scores.rows} rows"
    return found
