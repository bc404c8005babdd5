"""`run_task`, the only public door of the agent: a task in, a trajectory out. Serving and evaluation use the same."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from agent.client_tools import tools_of
from agent.codec import offered
from agent.graph import build_graph, run_plain
from agent.state import AgentDeps, ModelRef, RunContext, RunOptions
from agent.tools import check_tools
from agent.verify import judge_trajectory
from memory.errors import NightschoolError, VerifierError
from memory.records import Consulted, Purpose, Recalled, Step, StopReason, Task, Trajectory, new_id, now

log = logging.getLogger(__name__)


async def run_task(
    task: Task,
    model: ModelRef,
    deps: AgentDeps,
    *,
    purpose: Purpose,
    sampling: dict[str, Any] | None = None,
    trajectory_id: str | None = None,
    options: RunOptions | None = None,
) -> Trajectory:
    """Run one task on one generation.

    `sampling`: OpenAI fields that override the agent's own. `trajectory_id`: with a checkpointer, a run
    that was killed goes on at its last finished step when called again with the same id, task and generation; with
    another task or generation it begins anew.

    A task that fails is data: its error is on the trajectory. Only bugs and cancellation raise, and
    ConfigError for an unknown tool.
    """
    tools = check_tools(deps.config.tools if task.tools is None else task.tools)
    sampling = {"temperature": deps.config.temperature, "max_tokens": deps.config.max_tokens, **(sampling or {})}
    run_id, started_at, started = trajectory_id or new_id("traj"), now(), time.monotonic()
    options = options or RunOptions()
    allowed = options.may_call
    context = RunContext(
        deps=deps,
        model=model,
        sampling=sampling,
        tools=offered(tools, task.client_tools),
        run_id=run_id,
        client=tuple(tool for tool in tools_of(task.client_tools) if allowed is None or tool.name in allowed),
        withhold_share=deps.withhold_share if purpose is Purpose.SERVE else 0.0,
        options=options,
    )
    state, error = await _drive(task, context, run_id)
    stop = StopReason.ERROR if error else StopReason(state.get("stop_reason") or StopReason.ERROR)
    trajectory = Trajectory(
        id=run_id,
        task_id=task.id,
        tenant=task.tenant,
        workload=task.workload,
        purpose=purpose,
        generation=model.generation,
        model=model.name,
        sampling=sampling,
        tools=tools,
        client_tools=task.client_tools,
        conversation_id=options.conversation_id,
        continues=options.before.id if options.before else None,
        inherited_steps=context.inherited,
        messages=state.get("messages") or task.messages,
        steps=[Step.model_validate(step) for step in state.get("steps") or []],
        recalled=[Recalled.model_validate(item) for item in state.get("recalled") or []],
        consulted=[Consulted.model_validate(passage) for passage in state.get("consulted") or []],
        answer=state.get("answer"),
        stop_reason=stop,
        error=str(error) if error else None,
        error_type=type(error).__name__ if error else None,
        started_at=started_at,
        seconds=time.monotonic() - started,
    )
    return await _judged(task, trajectory)


async def _drive(task: Task, context: RunContext, run_id: str) -> tuple[dict[str, Any], NightschoolError | None]:
    """The final state, and the error that ended the run early, if one did."""
    checkpointer = context.deps.checkpointer
    if not context.tools and checkpointer is None:
        return await _drained(run_plain(task.model_dump(mode="json"), context))
    graph = build_graph(checkpointer)
    thread: Any = {"configurable": {"thread_id": run_id}, "recursion_limit": 4 * context.deps.config.max_turns + 10}
    begin: Any = {"task": task.model_dump(mode="json"), "model": context.model.name}
    left = (await graph.aget_state(thread)).values if checkpointer is not None else {}
    if left and _goes_on(left, begin):
        begin = None
    elif left and checkpointer is not None:
        await checkpointer.adelete_thread(run_id)
    state, error = await _drained(graph.astream(begin, thread, context=context, stream_mode="values"))
    if checkpointer is not None and state.get("stop_reason"):
        # A finished run's checkpoints are dead weight: the trajectory is in the ledger.
        await checkpointer.adelete_thread(run_id)
    return state, error


def _goes_on(left: dict[str, Any], begin: dict[str, Any]) -> bool:
    """Whether a state is of the same question to the same generation: an id comes back with another one when a client
    uses its idempotency key again."""
    own = {"id", "created_at", "caller"}
    before, asked = left["task"].items(), begin["task"].items()
    same = [item for item in before if item[0] not in own] == [item for item in asked if item[0] not in own]
    return same and left.get("model") == begin["model"]


async def _drained(states: AsyncIterator[dict[str, Any]]) -> tuple[dict[str, Any], NightschoolError | None]:
    state: dict[str, Any] = {}
    try:
        async for update in states:
            state = update
    except NightschoolError as exc:
        return state, exc
    return state, None


async def _judged(task: Task, trajectory: Trajectory) -> Trajectory:
    unfinished = trajectory.stop_reason in (StopReason.ERROR, StopReason.TOOL_CALLS)
    if unfinished or (task.verifier is None and task.reference is None):
        return trajectory
    try:
        outcome = await asyncio.to_thread(judge_trajectory, task, trajectory)
    except VerifierError as exc:
        log.warning("run %s could not be judged: %s", trajectory.id, exc)
        return trajectory.model_copy(update={"error": str(exc), "error_type": "VerifierError"})
    return trajectory.model_copy(update={"outcome": outcome})
