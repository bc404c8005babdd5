"""Conversations over a client's tools: one whole run, with the text that was served; beginnings teach nothing."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from agent.codec import wire
from agent.llm import ScriptedModel
from agent.prompts import compose
from agent.run import run_task
from agent.state import AgentDeps, ModelRef, RunOptions
from distill.layout import Layout
from distill.principles import past_runs
from distill.recipes.contrast import contrast
from distill.recipes.corrections import corrections
from distill.recipes.successes import successes
from distill.snapshot import Snapshot
from memory.recall import NoMemory
from memory.records import Feedback, FeedbackKind, Message, Purpose, StopReason, Task, Trajectory, Trust

WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
ASKED: list[Message] = [{"role": "user", "content": "How is the weather in Paris?"}]
CALL = 'Action: get_weather({"city": "Paris"})'


def run(model: ScriptedModel, task: Task, before: Trajectory | None = None) -> Trajectory:
    options = RunOptions(before=before)
    doing = run_task(task, ModelRef(0, "base"), AgentDeps(llm=model), purpose=Purpose.SERVE, options=options)
    return asyncio.run(doing)


def conversation(answer: str) -> tuple[ScriptedModel, list[Task], list[Trajectory]]:
    """A call of a client's tool, and the run that answers with its result."""
    model = ScriptedModel([CALL, f"Action: finish({answer})"])
    first = Task(messages=ASKED, tools=[], client_tools=[WEATHER])
    begun = run(model, first)
    call = begun.messages[-1]
    result = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "sunny"}
    second = first.model_copy(
        update={"id": "task_second", "messages": [*ASKED, call, result], "reference": "It is sunny."}
    )
    return model, [first, second], [begun, run(model, second, begun)]


def snapshot(tasks: list[Task], runs: list[Trajectory], feedback: list[Feedback] | None = None) -> Snapshot:
    return Snapshot(trajectories=runs, feedback=feedback or [], tasks={task.id: task for task in tasks})


def test_a_beginning_is_no_run_to_learn_from() -> None:
    _, tasks, runs = conversation("It is sunny.")
    assert [t.id for t in snapshot(tasks, runs).trajectories] == [runs[1].id]
    assert [t.id for t in snapshot(tasks, runs).begun] == [runs[0].id]
    assert snapshot(tasks, runs[:1]).trajectories == []


def test_a_run_that_another_continues_is_left_out_whatever_it_ended_in() -> None:
    _, tasks, runs = conversation("It is sunny.")
    ended = runs[0].model_copy(update={"stop_reason": StopReason.ANSWER, "answer": "x"})
    assert [t.id for t in snapshot(tasks, [ended, runs[1]]).trajectories] == [runs[1].id]


def test_feedback_on_a_beginning_makes_no_example() -> None:
    _, tasks, runs = conversation("It is sunny.")
    said = Feedback(
        trajectory_id=runs[0].id, kind=FeedbackKind.CORRECTION, value="Better.", author="ann", trust=Trust.TRUSTED
    )
    assert list(corrections(snapshot(tasks, runs, [said]))) == []


def test_the_whole_conversation_is_the_example_and_renders_as_it_was_served() -> None:
    model, tasks, runs = conversation("It is sunny.")
    assert runs[0].outcome is None
    (example,) = successes(snapshot(tasks, runs))
    assert example.task_id == tasks[0].id
    laid_out = Layout(NoMemory(), compose).served(example, tasks[0])
    assert wire(laid_out.messages, laid_out.tools) == [
        *model.requests[1].messages,
        {"role": "assistant", "content": "Action: finish(It is sunny.)"},
    ]
    assert wire(laid_out.messages[:2], laid_out.tools) == model.requests[0].messages


def test_a_correction_of_the_answer_keeps_the_clients_results_before_it() -> None:
    model, tasks, runs = conversation("It rains.")
    said = Feedback(
        trajectory_id=runs[1].id, kind=FeedbackKind.CORRECTION, value="It is sunny.", author="ann", trust=Trust.TRUSTED
    )
    material = snapshot(tasks, runs, [said])
    (example,) = corrections(material)
    laid_out = Layout(NoMemory(), compose).served(example, tasks[1])
    assert [m["content"] for m in wire(laid_out.messages, laid_out.tools)] == [
        *(m["content"] for m in model.requests[1].messages),
        "Action: finish(It is sunny.)",
    ]
    (pair,) = contrast(material)
    assert pair.tools == ["client:get_weather"]


def test_a_conversation_that_went_well_may_be_recalled_whole() -> None:
    _, tasks, runs = conversation("It is sunny.")
    (past,) = past_runs(snapshot(tasks, runs))
    assert [m["role"] for m in past.messages] == ["user", "assistant", "tool", "assistant"]


@pytest.mark.parametrize("known", [True, False])
def test_without_its_beginning_a_run_teaches_its_last_turn(known: bool) -> None:
    _, tasks, runs = conversation("It is sunny.")
    (example,) = successes(snapshot(tasks, runs if known else runs[1:]))
    assert len(example.messages) == 4
    assert example.task_id == tasks[0 if known else 1].id
