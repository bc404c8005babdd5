"""Runs a suite with a generation, by the same `run_task` that serves users.

Owns concurrency, the one retry of an engine error and the turning of runs into an Evaluation.
Owns no engine, no storage and no comparison (`evals.gate`).
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from agent.run import AgentDeps, ModelRef, run_task
from evals.suites import EvalTask, Suite
from memory.errors import ConfigError, ContextLengthError, ModelError, VerifierError
from memory.night_records import Evaluation, TaskOutcome
from memory.recall import NoMemory
from memory.records import OutcomeSource, Purpose, StopReason, Trajectory, content_hash

_THE_MODELS_OWN = ContextLengthError.__name__
"""A conversation that outgrew the context is the model's doing: a failed task, no hole."""

JUDGES: frozenset[OutcomeSource] = frozenset({OutcomeSource.VERIFIER, OutcomeSource.USER})
"""A critic is a model, and what trains against it learns to please it: its word counts for nothing here."""


async def evaluate(
    suite: Suite,
    model: ModelRef,
    deps: AgentDeps,
    *,
    memory: bool,
    memory_watermark: str,
    concurrency: int,
    on_progress: Callable[[int, int], None],
    night_id: str | None = None,
) -> tuple[Evaluation, list[Trajectory]]:
    """Run every task of the suite, at most `concurrency` at once; outcomes stand in the suite's order. Of a suite made
    from days, what its verifier could not judge is named in `unjudged` instead.

    `memory=False` hands the agent an empty memory; else it is what the ledger held at
    `memory_watermark`. `on_progress(done, total)` is called at the start and after every task.

    Raises: ModelError when a task's run ended in an engine error twice, VerifierError when a run could
    not be judged, ConfigError for `concurrency` < 1. An evaluation with holes is no evidence, so none
    is returned; the first such error stops the runs that are still going.
    """
    if concurrency < 1:
        raise ConfigError(f"concurrency must be at least 1, got {concurrency}")
    deps = deps if memory else replace(deps, recaller=NoMemory())
    gate = asyncio.Semaphore(concurrency)
    started = time.perf_counter()
    done, total = 0, len(suite.tasks)
    on_progress(done, total)

    async def one(item: EvalTask) -> Trajectory:
        nonlocal done
        async with gate:
            trajectory = await _run(item, model, deps, suite.name)
        done += 1
        on_progress(done, total)
        return trajectory

    try:
        async with asyncio.TaskGroup() as group:
            running = [group.create_task(one(item)) for item in suite.tasks]
    except BaseExceptionGroup as failures:
        raise failures.exceptions[0] from failures
    trajectories = [task.result() for task in running]
    done_by = list(zip(suite.tasks, trajectories, strict=True))
    unjudged = {i.key for i, t in done_by if suite.from_days and _failed_judge(t)}
    evaluation = Evaluation(
        suite=suite.name,
        suite_hash=suite.hash,
        role=suite.role,
        generation=model.generation,
        memory=memory,
        memory_watermark=memory_watermark if memory else "",
        settings=settings_of(deps),
        outcomes=[_outcome(i, t) for i, t in done_by if i.key not in unjudged],
        unjudged=sorted(unjudged),
        seconds=time.perf_counter() - started,
        night_id=night_id,
    )
    return evaluation, trajectories


def settings_of(deps: AgentDeps) -> dict[str, object]:
    """What else shapes a run: two evaluations are comparable only when it is equal."""
    return deps.config.model_dump(mode="json")


async def _run(item: EvalTask, model: ModelRef, deps: AgentDeps, suite: str) -> Trajectory:
    sampling = _sampling(item.key, deps)
    trajectory = await run_task(item.task, model, deps, purpose=Purpose.EVAL, sampling=sampling)
    if _is_hole(trajectory):
        trajectory = await run_task(item.task, model, deps, purpose=Purpose.EVAL, sampling=sampling)
    if _is_hole(trajectory):
        why = trajectory.error or trajectory.stop_reason
        raise ModelError(
            f"task {item.key!r} of suite {suite!r} failed twice on {model.name}: {why}; "
            "check the engine (`nightschool status`) and evaluate again"
        )
    return trajectory


def _sampling(key: str, deps: AgentDeps) -> dict[str, Any] | None:
    """Where answers are sampled: the task's own seed, so that all generations draw with the same one."""
    if not deps.config.temperature:
        return None
    return {"seed": int(hashlib.sha256(key.encode()).hexdigest()[:7], 16)}


def _is_hole(trajectory: Trajectory) -> bool:
    if trajectory.stop_reason is StopReason.ERROR:
        return trajectory.error_type != _THE_MODELS_OWN
    return trajectory.stop_reason is StopReason.CANCELLED


def _failed_judge(trajectory: Trajectory) -> bool:
    return trajectory.outcome is None and trajectory.error_type == VerifierError.__name__


def _outcome(item: EvalTask, trajectory: Trajectory) -> TaskOutcome:
    outgrown = trajectory.stop_reason is StopReason.ERROR
    if trajectory.outcome is None and not outgrown:
        raise VerifierError(
            f"task {item.key!r} could not be judged ({trajectory.error or 'it names no verifier'}): "
            "give it a verifier or a reference"
        )
    if trajectory.outcome is not None and trajectory.outcome.by not in JUDGES:
        raise VerifierError(
            f"task {item.key!r} was judged by a {trajectory.outcome.by.value}: only a verifier's or a user's word "
            "may decide what is served; give it a verifier or a reference"
        )
    return TaskOutcome(
        key=item.key,
        workload=item.task.workload,
        score=trajectory.outcome.score if trajectory.outcome else 0.0,
        answer=trajectory.answer,
        trajectory_id=trajectory.id,
        prompt_tokens=sum(step.prompt_tokens or 0 for step in trajectory.steps),
        task_hash=content_hash(item.task.content)[:16],
        completion_tokens=sum(step.completion_tokens or 0 for step in trajectory.steps),
    )
