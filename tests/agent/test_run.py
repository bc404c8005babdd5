"""What a run leaves behind, and how it goes on after a kill: with LangGraph's real SQLite checkpointer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest

from agent.llm import ScriptedModel
from agent.run import run_task
from agent.state import AgentConfig, AgentDeps, ModelRef
from memory.errors import ModelUnavailableError
from memory.records import Purpose, StopReason, Task, Trajectory, VerifierSpec

SUM = Task(messages=[{"role": "user", "content": "What is 17 * 3?"}], reference="51", workload="sums", tenant="acme")
RUN_ID = "traj_1"


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the agent may catch it."""


def with_checkpoints(tmp_path: Path, story: Callable[[Any], Awaitable[Any]]) -> Any:
    """Run `story` with a checkpointer over a file; the settings are the service's."""

    async def tell() -> Any:
        from langgraph.checkpoint.sqlite.aio import AsyncSqliteSaver

        async with AsyncSqliteSaver.from_conn_string(str(tmp_path / "checkpoints.sqlite")) as saver:
            await saver.setup()
            return await story(saver)

    return asyncio.run(tell())


async def attempt(saver: Any, model: ScriptedModel, **config: Any) -> Trajectory:
    deps = AgentDeps(llm=model, config=AgentConfig(**config), checkpointer=saver)
    return await run_task(SUM, ModelRef(0, "base"), deps, purpose=Purpose.SERVE, trajectory_id=RUN_ID)


async def checkpoints(saver: Any) -> list[Any]:
    return [checkpoint async for checkpoint in saver.alist({"configurable": {"thread_id": RUN_ID}})]


def killed_at(call: int, replies: list[str]) -> ScriptedModel:
    """A model in whose n-th call (from 0) the process dies."""
    calls = iter(range(len(replies) + 1))

    def answer(_: Any) -> str:
        number = next(calls)
        if number == call:
            raise Killed
        return replies[number]

    return ScriptedModel(answer)


def test_a_run_killed_after_its_tool_step_goes_on_without_asking_again(tmp_path: Path) -> None:
    async def dies(saver: Any) -> None:
        with pytest.raises(Killed):
            await attempt(saver, killed_at(1, ["Action: calc(17*3)"]))
        assert await checkpoints(saver)

    model = ScriptedModel(["Action: finish(51)"])

    async def goes_on(saver: Any) -> Trajectory:
        return await attempt(saver, model)

    with_checkpoints(tmp_path, dies)
    trajectory = with_checkpoints(tmp_path, goes_on)
    assert (trajectory.id, trajectory.answer, trajectory.stop_reason) == (RUN_ID, "51", StopReason.ANSWER)
    assert [m["role"] for m in trajectory.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert len(trajectory.steps) == 2
    assert trajectory.success
    assert len(model.requests) == 1
    assert model.requests[0].messages[-1]["content"] == "Observation: 51"


def test_a_run_killed_in_its_second_try_at_an_action_is_not_reminded_twice(tmp_path: Path) -> None:
    async def story(saver: Any) -> Trajectory:
        with pytest.raises(Killed):
            await attempt(saver, killed_at(1, ["what"]))
        return await attempt(saver, ScriptedModel(["what again"]))

    trajectory = with_checkpoints(tmp_path, story)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert len(trajectory.steps) == 2


def test_a_run_that_failed_for_want_of_an_engine_goes_on_when_it_is_called_again(tmp_path: Path) -> None:
    async def story(saver: Any) -> tuple[Trajectory, Trajectory]:
        first = await attempt(saver, ScriptedModel(["Action: calc(17*3)", ModelUnavailableError("away")]))
        return first, await attempt(saver, ScriptedModel(["Action: finish(51)"]))

    first, second = with_checkpoints(tmp_path, story)
    assert (first.stop_reason, first.error_type) == (StopReason.ERROR, "ModelUnavailableError")
    assert (second.stop_reason, second.error, len(second.steps)) == (StopReason.ANSWER, None, 2)


def test_a_run_killed_after_its_answer_gives_it_again_without_asking(tmp_path: Path) -> None:
    async def story(saver: Any) -> Trajectory:
        class Dying(type(saver)):
            async def adelete_thread(self, thread_id: str) -> None:
                raise Killed

        with pytest.raises(Killed):
            await attempt(Dying(saver.conn), ScriptedModel(["Action: finish(51)"]))
        again = await attempt(saver, ScriptedModel([]))
        assert await checkpoints(saver) == []
        return again

    trajectory = with_checkpoints(tmp_path, story)
    assert (trajectory.answer, trajectory.stop_reason, len(trajectory.steps)) == ("51", StopReason.ANSWER, 1)


@pytest.mark.parametrize(
    "replies", [["Action: calc(17*3)", "Action: finish(51)"], ["what", "what"], ["Action: calc(1)", "Action: calc(2)"]]
)
def test_the_checkpoints_of_a_finished_run_are_deleted(tmp_path: Path, replies: list[str]) -> None:
    async def story(saver: Any) -> list[Any]:
        await attempt(saver, ScriptedModel(replies), max_turns=2)
        return await checkpoints(saver)

    assert with_checkpoints(tmp_path, story) == []


def test_a_checkpoint_holds_only_json(tmp_path: Path) -> None:
    async def story(saver: Any) -> list[Any]:
        class Keeping(type(saver)):
            async def adelete_thread(self, thread_id: str) -> None:
                """Keep."""

        await attempt(Keeping(saver.conn), ScriptedModel(["what", "Action: calc(1)", "Action: finish(1)"]))
        return await checkpoints(saver)

    def kinds(value: Any) -> set[type]:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else []
        return {type(value)}.union(*(kinds(item) for item in inner))

    kept = with_checkpoints(tmp_path, story)
    assert len(kept) > 5
    names = {"task", "messages", "recalled", "steps", "answer", "stop_reason", "reminded"}
    for checkpoint in kept:
        values = {name: v for name, v in checkpoint.checkpoint["channel_values"].items() if name in names}
        assert kinds(values) <= {dict, list, str, int, float, bool, type(None)}


def test_another_generation_or_question_under_the_same_id_begins_anew(tmp_path: Path) -> None:
    async def story(saver: Any) -> list[Trajectory]:
        done = []
        other = Task(messages=[{"role": "user", "content": "What is 2 * 2?"}])
        for task, model in ((SUM, ModelRef(1, "gen-1@abc")), (other, ModelRef(0, "base"))):
            with pytest.raises(Killed):
                await attempt(saver, killed_at(1, ["Action: calc(17*3)"]))
            deps = AgentDeps(llm=ScriptedModel(["Action: finish(4)"]), checkpointer=saver)
            done.append(await run_task(task, model, deps, purpose=Purpose.SERVE, trajectory_id=RUN_ID))
        return done

    same, other = with_checkpoints(tmp_path, story)
    for trajectory in (same, other):
        assert [m["role"] for m in trajectory.messages] == ["system", "user", "assistant"]
        assert trajectory.answer == "4"
    assert other.messages[1]["content"] == "What is 2 * 2?"


def test_cancelling_a_run_raises_and_nothing_else(tmp_path: Path) -> None:
    class Slow(ScriptedModel):
        async def complete(self, request: Any) -> Any:
            reached.set()
            await asyncio.Event().wait()

    reached = asyncio.Event()

    async def story(saver: Any) -> Trajectory:
        running = asyncio.create_task(attempt(saver, Slow([])))
        await reached.wait()
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        return await attempt(saver, ScriptedModel(["Action: finish(51)"]))

    assert with_checkpoints(tmp_path, story).answer == "51"


def test_a_bug_is_not_data() -> None:
    deps = AgentDeps(llm=ScriptedModel([RuntimeError("a bug")]))
    with pytest.raises(RuntimeError, match="a bug"):
        asyncio.run(run_task(SUM, ModelRef(0, "base"), deps, purpose=Purpose.SERVE))


def test_a_trajectory_says_who_ran_what_and_how() -> None:
    deps = AgentDeps(llm=ScriptedModel(["Action: finish(51)"]))
    doing = run_task(SUM, ModelRef(4, "gen-4@abc"), deps, purpose=Purpose.EVAL, sampling={"seed": 7})
    trajectory = asyncio.run(doing)
    assert (trajectory.task_id, trajectory.tenant, trajectory.workload) == (SUM.id, "acme", "sums")
    assert (trajectory.generation, trajectory.model, trajectory.purpose) == (4, "gen-4@abc", Purpose.EVAL)
    assert trajectory.tools == ["calculator"]
    assert trajectory.sampling == {"temperature": 0.0, "max_tokens": 72, "seed": 7}
    assert trajectory.seconds > 0
    assert trajectory == Trajectory.model_validate_json(trajectory.model_dump_json())


def test_runs_side_by_side_do_not_mix(tmp_path: Path) -> None:
    def answer(request: Any) -> str:
        number = request.messages[1]["content"]
        return f"Action: calc({number} + 1)" if len(request.messages) == 2 else f"Action: finish({number})"

    async def story(saver: Any) -> list[Trajectory]:
        deps = AgentDeps(llm=ScriptedModel(answer), checkpointer=saver)
        tasks = [Task(messages=[{"role": "user", "content": str(n)}]) for n in range(12)]
        return await asyncio.gather(*(run_task(t, ModelRef(0, "base"), deps, purpose=Purpose.SERVE) for t in tasks))

    trajectories = with_checkpoints(tmp_path, story)
    assert [t.answer for t in trajectories] == [str(n) for n in range(12)]
    assert [t.messages[3]["content"] for t in trajectories] == [str(n + 1) for n in range(12)]


def test_a_verifier_that_cannot_judge_leaves_the_run_unjudged_and_says_why() -> None:
    task = SUM.model_copy(update={"verifier": VerifierSpec(name="regex", args={"pattern": "("})})
    deps = AgentDeps(llm=ScriptedModel(["Action: finish(51)"]))
    trajectory = asyncio.run(run_task(task, ModelRef(0, "base"), deps, purpose=Purpose.SERVE))
    assert (trajectory.answer, trajectory.stop_reason, trajectory.outcome) == ("51", StopReason.ANSWER, None)
    assert trajectory.error_type == "VerifierError"
