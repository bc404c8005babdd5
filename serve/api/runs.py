"""A chat request as a run: admitted, run on the asked-for generation, committed to the ledger before anyone is told.

Chat completions, responses and batches all come through here; how their replies look is theirs.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from typing import Any

from agent.events import Emit, TextDelta, ToolCallDelta, Watched
from agent.run import run_task
from agent.state import RunOptions
from memory import errors as our_errors
from memory.errors import ConflictError, NotFoundError
from memory.escalations import Reason
from memory.recall import NoMemory
from memory.records import OutcomeSource, Purpose, StopReason, Task, Trajectory, new_id
from serve import counters, promotion
from serve.api import openai_types as oai
from serve.api.chat_tools import may_call, must_call
from serve.api.conversations import predecessor
from serve.api.errors import BusyError
from serve.escalation import Teacher
from serve.settings import ServerConfig
from serve.wiring import Services

RunEvent = TextDelta | ToolCallDelta | Watched | Trajectory
"""What a run says while it goes on; the trajectory comes last, when it is in the ledger."""

Keep = Callable[[Task, Trajectory], Awaitable[None]]
"""Commits a run; returns once it is in the ledger."""


class Turnstile:
    """Lets `max_concurrent` runs in, keeps `max_waiting` waiting, turns further ones away with 429."""

    def __init__(self, config: ServerConfig) -> None:
        self._slots = asyncio.Semaphore(config.max_concurrent)
        self._limit = config.max_concurrent + config.max_waiting
        self.inside = 0

    @asynccontextmanager
    async def enter(self) -> AsyncIterator[None]:
        if self.inside >= self._limit:
            raise BusyError("too many requests are waiting; try again in a few seconds")
        self.inside += 1
        try:
            async with self._slots:
                yield
        finally:
            self.inside -= 1


def trajectory_id(key: str | None, tenant: str) -> str:
    """A retried request names the same run: the id follows from its idempotency key."""
    return f"traj_{hashlib.sha256(f'{tenant}/{key}'.encode()).hexdigest()[:32]}" if key else new_id("traj")


async def answer(
    services: Services,
    turnstile: Turnstile,
    task: Task,
    request: oai.ChatCompletionRequest,
    run_id: str,
    resumable: bool,
    keep: Keep | None = None,
    emit: Emit | None = None,
    conversation_id: str | None = None,
) -> Trajectory:
    """Run the task on the asked-for generation and commit task and trajectory to the ledger.

    `resumable`: a run that is killed goes on at its last step when it is asked for again with the same id.
    `keep` commits in the caller's way instead (a batch commits several runs with their lines at once).
    `emit` hears the run while it goes on. `conversation_id`: the caller's name for what the run belongs to,
    where the request's `metadata` has none.
    A run that ended in an error of the engine or the request raises it; the ledger then has nothing of it.

    With a teacher, a run that is expected to fail or failed its check may be the teacher's. A reply that is being
    streamed cannot be taken back: after a failed check the teacher's run is kept for the night, and not sent.
    """
    with_agent, generation = promotion.resolve(services.ledger, request.model, promotion.asker_of(task))
    deps, asked = services.deps, task
    if not resumable:
        deps = replace(deps, checkpointer=None)
    if not with_agent:
        deps = replace(deps, recaller=NoMemory(), checkpointer=None)
        task = task.model_copy(update={"tools": []})
    options = await _options(services, task, request, run_id, emit, conversation_id)
    teacher = _teacher(services, task, request)
    trajectory = await _instead(services, teacher, task, generation.number, run_id, request, options)
    if own := trajectory is None:
        async with turnstile.enter(), services.residency.using(generation):
            trajectory = await run_task(
                task,
                promotion.model_ref(generation),
                deps,
                purpose=Purpose.UNTAUGHT if request.store is False else Purpose.SERVE,
                sampling=_sampling(request, with_agent, services),
                trajectory_id=run_id,
                options=options,
            )
    if trajectory.stop_reason is StopReason.ERROR:
        # Nothing was acknowledged, and a retry with the same key must run again: only the log keeps it.
        kind = getattr(our_errors, trajectory.error_type or "", our_errors.ModelError)
        raise kind(trajectory.error)
    failed = own and teacher is not None and _failed(trajectory)
    if failed and teacher is not None and emit is None:
        trajectory = await _helped(services, teacher, task, trajectory, request)
    if keep is not None:
        await keep(asked, trajectory)
    else:
        await services.ledger.record(asked, trajectory)
    if failed and teacher is not None and emit is not None:
        teacher.afterwards(_for_the_night(services, teacher, task, trajectory, request))
    counters.ran(trajectory)
    return trajectory


async def run_events(
    services: Services,
    turnstile: Turnstile,
    task: Task,
    request: oai.ChatCompletionRequest,
    run_id: str,
    resumable: bool,
    conversation_id: str | None = None,
) -> AsyncIterator[RunEvent]:
    """`answer`, as it happens. Closing the iterator cancels the run; errors are raised as by `answer`."""
    events: asyncio.Queue[RunEvent | None] = asyncio.Queue()

    async def work() -> Trajectory:
        try:
            run = (services, turnstile, task, request, run_id, resumable)
            return await answer(*run, emit=events.put_nowait, conversation_id=conversation_id)
        finally:
            events.put_nowait(None)

    running = asyncio.create_task(work())
    said, calls = "", False
    try:
        while (event := await events.get()) is not None:
            said += event.text if isinstance(event, TextDelta) else ""
            calls = calls or isinstance(event, ToolCallDelta)
            yield event
        trajectory = await running
    finally:
        running.cancel()
        with suppress(asyncio.CancelledError, Exception):
            await running
    # A run that was resumed after its last step has said nothing yet.
    for event in unsaid(trajectory, said, calls):
        yield event
    yield trajectory


def _teacher(services: Services, task: Task, request: oai.ChatCompletionRequest) -> Teacher | None:
    """The teacher, where it may take this task: whoever names a generation, or wants nothing kept, asks for that."""
    teacher = services.teacher
    mine = teacher is not None and request.model == promotion.AGENT_MODEL and request.store is not False
    return teacher if mine and teacher is not None and teacher.may_see(task) else None


async def _instead(
    services: Services,
    teacher: Teacher | None,
    task: Task,
    generation: int,
    run_id: str,
    request: oai.ChatCompletionRequest,
    options: RunOptions,
) -> Trajectory | None:
    """The teacher's run of a task that the own model is expected to fail; None: the own model is to run it."""
    chance = await teacher.foreseen(task, generation, run_id) if teacher is not None else None
    if teacher is None or chance is None:
        return None
    return await teacher.run(
        task,
        services.deps,
        generation,
        Reason.PREDICTED,
        run_id=run_id,
        expected=chance,
        conversation_id=options.conversation_id,
        sampling=_asked_of_teacher(request),
    )


async def _second(
    services: Services, teacher: Teacher, task: Task, failed: Trajectory, request: oai.ChatCompletionRequest
) -> Trajectory | None:
    """The teacher's run of a task that the own model failed."""
    return await teacher.run(
        task,
        services.deps,
        failed.generation,
        Reason.FAILED,
        conversation_id=failed.conversation_id,
        sampling=_asked_of_teacher(request),
    )


async def _helped(
    services: Services, teacher: Teacher, task: Task, failed: Trajectory, request: oai.ChatCompletionRequest
) -> Trajectory:
    """The run that answers the client: the teacher's, where it did better. The other one is in the ledger beside it."""
    taught = await _second(services, teacher, task, failed, request)
    if taught is None:
        return failed
    if failed.answer is not None and _score(taught) <= _score(failed):
        await services.ledger.record(task, taught)
        return failed
    await services.ledger.record(task, failed.model_copy(update={"id": taught.id}))
    return taught.model_copy(update={"id": failed.id})


async def _for_the_night(
    services: Services, teacher: Teacher, task: Task, failed: Trajectory, request: oai.ChatCompletionRequest
) -> Trajectory | None:
    taught = await _second(services, teacher, task, failed, request)
    if taught is not None:
        await services.ledger.record(task, taught)
    return taught


def _failed(run: Trajectory) -> bool:
    judged = run.outcome is not None and run.outcome.by is OutcomeSource.VERIFIER
    return run.answer is None or (judged and not run.success)


def _score(run: Trajectory) -> float:
    return run.outcome.score if run.outcome is not None else 0.0


def _asked_of_teacher(request: oai.ChatCompletionRequest) -> dict[str, Any]:
    """What the request says of sampling that means the same to any model."""
    ours = ("logit_bias", "logprobs", "top_logprobs", "seed")
    return {name: value for name, value in request.sampling.items() if name not in ours}


def unsaid(trajectory: Trajectory, said: str = "", calls: bool = False) -> list[RunEvent]:
    """What is left to say of a run that ended: all of it, less the text and the calls that were said."""
    rest = (trajectory.answer or "").removeprefix(said)
    events: list[RunEvent] = [TextDelta(rest)] if rest else []
    if not calls:
        for index, call in enumerate(oai.tool_calls(trajectory)):
            events.append(ToolCallDelta(index, call["id"], call["function"]["name"], call["function"]["arguments"]))
    return events


async def _options(
    services: Services,
    task: Task,
    request: oai.ChatCompletionRequest,
    run_id: str,
    emit: Emit | None,
    conversation_id: str | None,
) -> RunOptions:
    own = services.deps.config.tools if task.tools is None else task.tools
    before = await asyncio.to_thread(predecessor, services.ledger, task, own) if task.client_tools else None
    given = (request.metadata or {}).get("conversation_id") or conversation_id
    # The first run of a conversation with client-side tools cannot know whether another follows.
    follows = before.conversation_id if before else run_id if task.client_tools else None
    return RunOptions(
        emit=emit,
        before=before,
        may_call=may_call(request.tool_choice),
        must_call=must_call(request.tool_choice),
        accept_cut=True,
        cache_key=request.prompt_cache_key,
        conversation_id=given or follows,
    )


def _sampling(request: oai.ChatCompletionRequest, with_agent: bool, services: Services) -> dict[str, Any]:
    # A line of our own tools is short; whatever else a model says may be long.
    short = with_agent and not request.tools and "response_format" not in request.sampling
    long_default = {} if short else {"max_tokens": services.settings.agent.max_run_tokens // 8}
    return long_default | request.sampling


def stored_run(services: Services, run_id: str, task: Task) -> Trajectory | None:
    try:
        trajectory = services.ledger.get_trajectory(run_id, tenant=task.tenant)
    except NotFoundError:
        return None
    if services.ledger.get_task(trajectory.task_id, tenant=task.tenant).fingerprint != task.fingerprint:
        raise ConflictError("this Idempotency-Key was used with another request body")
    return trajectory
