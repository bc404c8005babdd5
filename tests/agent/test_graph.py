"""The order of things inside one run, through `run_task`, the graph's only door."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from agent.llm import ChatReply, ChatRequest, ScriptedModel
from agent.run import run_task
from agent.state import AgentConfig, AgentDeps, ModelRef
from memory.errors import ConfigError, ContextLengthError, IndexUnavailableError, ModelUnavailableError
from memory.recall import Recall, Recaller
from memory.records import (
    MALFORMED,
    RECALLED,
    MemoryKind,
    Message,
    PastRun,
    Principle,
    PrincipleKind,
    Purpose,
    Recalled,
    StopReason,
    Task,
    Trajectory,
)

SUM = Task(messages=[{"role": "user", "content": "What is 17 * 3?"}], reference="51")
PAST = PastRun(
    task_id="task_old",
    messages=[
        {"role": "user", "content": "What is 2 * 3?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {
                    "id": "c",
                    "type": "function",
                    "function": {"name": "calculator", "arguments": '{"expression": "2*3"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c", "content": "6"},
        {"role": "assistant", "content": "6"},
    ],
)
RULE = Principle(kind=PrincipleKind.GUIDING, text="Multiply with the tool.")


class Recalls:
    """A memory that holds these items."""

    def __init__(self, *, runs: list[PastRun] | None = None, principles: list[Principle] | None = None) -> None:
        self.runs, self.principles = runs or [], principles or []

    def recall(self, task: Task, **_: Any) -> Recall:
        numbers: dict[str, Any] = {
            "similarity": 0.9,
            "score": 0.5,
            "recency": 1.0,
            "rank": 0.83,
            "tokens": 20,
            "why": "near",
        }
        items = [Recalled(id=r.id, kind=MemoryKind.RUN, **numbers) for r in self.runs]
        items += [Recalled(id=p.id, kind=MemoryKind.PRINCIPLE, **numbers) for p in self.principles]
        return Recall(items=items, principles=self.principles, runs=self.runs)


def run(
    script: Any,
    task: Task = SUM,
    recaller: Recaller | None = None,
    sampling: dict[str, Any] | None = None,
    **config: Any,
) -> tuple[Trajectory, list[ChatRequest]]:
    """The trajectory, and what the model was asked."""
    model = script if isinstance(script, ScriptedModel) else ScriptedModel(script)
    known: dict[str, Any] = {"recaller": recaller} if recaller else {}
    deps = AgentDeps(llm=model, config=AgentConfig(**config), **known)
    doing = run_task(task, ModelRef(3, "gen-3@abc"), deps, purpose=Purpose.EVAL, sampling=sampling)
    return asyncio.run(doing), model.requests


def roles(messages: list[Message]) -> list[str]:
    return [message["role"] for message in messages]


def test_a_tool_is_called_and_its_result_leads_to_the_answer() -> None:
    trajectory, requests = run(["Action: calc(17*3)", "Action: finish(51)"])
    assert (trajectory.answer, trajectory.stop_reason, trajectory.success) == ("51", StopReason.ANSWER, True)
    assert roles(trajectory.messages) == ["system", "user", "assistant", "tool", "assistant"]
    call, observation, last = trajectory.messages[2:]
    assert call["tool_calls"][0]["function"] == {"name": "calculator", "arguments": '{"expression": "17*3"}'}
    assert observation == {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "51"}
    assert last == {"role": "assistant", "content": "51"}
    assert [step.message for step in trajectory.steps] == [2, 4]
    assert [m["content"] for m in requests[1].messages[2:]] == ["Action: calc(17*3)", "Observation: 51"]


def test_the_engine_is_asked_for_the_generation_the_tenant_and_an_action() -> None:
    _, (request,) = run(["Action: finish(51)"], SUM.model_copy(update={"tenant": "acme"}))
    assert (request.model, request.cache_salt) == ("gen-3@abc", "acme")
    assert re.fullmatch(request.regex or "", "Action: calc(1)")


def test_the_reference_is_never_shown_to_the_model() -> None:
    task = SUM.model_copy(update={"reference": "fifty-one"})
    trajectory, requests = run(["Action: calc(1", "Action: calc(17*3)", "Action: finish(51)"], task)
    assert "fifty-one" not in str(requests)
    assert trajectory.outcome is not None
    assert not trajectory.success


def test_a_malformed_action_is_reminded_of_once() -> None:
    trajectory, requests = run(["The answer is 51", "Action: finish(51)"])
    assert trajectory.stop_reason is StopReason.ANSWER
    assert roles(trajectory.messages) == ["system", "user", "assistant", "user", "assistant"]
    assert trajectory.messages[2] == {"role": "assistant", "content": "The answer is 51", "name": MALFORMED}
    assert "Action:" in requests[1].messages[-1]["content"]


def test_a_second_malformed_action_ends_the_run() -> None:
    trajectory, requests = run(["what", "Action: calc(17*3)", "no"])
    assert (trajectory.stop_reason, trajectory.answer, trajectory.error) == (StopReason.MALFORMED, None, None)
    assert trajectory.outcome is not None
    assert trajectory.outcome.score == 0
    assert len(requests) == 3
    assert [m.get("name") for m in trajectory.messages if m["role"] == "assistant"] == [MALFORMED, None, MALFORMED]


def test_a_run_that_never_answers_ends_at_its_last_turn() -> None:
    trajectory, requests = run(lambda _: "Action: calc(1)", max_turns=3)
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.MAX_TURNS, None)
    assert len(requests) == len(trajectory.steps) == 3


def test_a_reminder_takes_no_extra_turn() -> None:
    trajectory, requests = run(["what", "what"], max_turns=1)
    assert trajectory.stop_reason is StopReason.MALFORMED
    assert len(requests) == 1


def test_a_run_ends_when_its_tokens_are_spent() -> None:
    trajectory, requests = run(lambda _: "Action: calc(1 " + "+ 1 " * 40 + ")", max_run_tokens=100)
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    assert len(requests) == 2


def test_the_longest_run_that_is_allowed_fits_the_graph() -> None:
    trajectory, _ = run(lambda _: "Action: calc(1)", max_turns=64)
    assert trajectory.stop_reason is StopReason.MAX_TURNS
    assert len(trajectory.steps) == 64


def test_a_tools_refusal_is_an_observation() -> None:
    trajectory, requests = run(["Action: calc(1/0)", "Action: finish(none)"])
    assert trajectory.stop_reason is StopReason.ANSWER
    assert trajectory.messages[3]["content"] == "error: division by zero"
    assert requests[1].messages[-1]["content"] == "Observation: error: division by zero"


def test_an_answer_is_trimmed_for_the_user_and_kept_as_it_was_said() -> None:
    trajectory, _ = run(["Action: finish( 51 )"])
    assert trajectory.answer == "51"
    assert trajectory.messages[-1]["content"] == " 51 "


@pytest.mark.parametrize(
    "error", [ModelUnavailableError("the engine is away"), ContextLengthError("the prompt does not fit")]
)
def test_an_error_of_the_engine_is_data(error: Exception) -> None:
    trajectory, _ = run(["Action: calc(17*3)", error])
    assert (trajectory.stop_reason, trajectory.error) == (StopReason.ERROR, str(error))
    assert trajectory.error_type == type(error).__name__
    assert roles(trajectory.messages) == ["system", "user", "assistant", "tool"]
    assert len(trajectory.steps) == 1
    assert (trajectory.answer, trajectory.outcome) == (None, None)


def test_an_error_of_the_first_call_leaves_what_was_asked() -> None:
    trajectory, _ = run([ModelUnavailableError("away")], recaller=Recalls(runs=[PAST]))
    assert trajectory.stop_reason is StopReason.ERROR
    assert trajectory.messages[-1] == SUM.messages[0]
    assert [item.id for item in trajectory.recalled] == [PAST.id]
    assert trajectory.steps == []


def test_an_error_of_memory_is_data() -> None:
    class Broken(Recalls):
        def recall(self, task: Task, **_: Any) -> Recall:
            raise IndexUnavailableError("the index is broken")

    trajectory, requests = run([], recaller=Broken())
    assert (trajectory.stop_reason, trajectory.error_type) == (StopReason.ERROR, "IndexUnavailableError")
    assert trajectory.messages == SUM.messages
    assert requests == []


def test_an_unknown_tool_is_refused_before_anything_runs() -> None:
    with pytest.raises(ConfigError, match="shell"):
        run([], SUM.model_copy(update={"tools": ["shell"]}))


def test_recalled_runs_are_chat_turns_that_are_marked_and_listed_with_their_numbers() -> None:
    trajectory, (request,) = run(["Action: finish(51)"], recaller=Recalls(runs=[PAST], principles=[RULE]))
    assert [m.get("name") for m in trajectory.messages] == [None, *[RECALLED] * 4, None, None]
    assert [m["content"] for m in request.messages[1:5]] == [
        "What is 2 * 3?",
        "Action: calc(2*3)",
        "Observation: 6",
        "Action: finish(6)",
    ]
    assert RULE.text in request.messages[0]["content"]
    assert [(item.id, item.similarity, item.why) for item in trajectory.recalled] == [
        (PAST.id, 0.9, "near"),
        (RULE.id, 0.9, "near"),
    ]
    assert trajectory.own_messages == [SUM.messages[0], {"role": "assistant", "content": "51"}]
    assert [step.message for step in trajectory.steps] == [6]


def test_a_past_run_that_used_a_tool_which_is_not_offered_is_neither_shown_nor_listed() -> None:
    task = SUM.model_copy(update={"tools": ["python"]})
    trajectory, (request,) = run(["Action: finish(51)"], task, Recalls(runs=[PAST], principles=[RULE]))
    assert [item.id for item in trajectory.recalled] == [RULE.id]
    assert "2 * 3" not in str(request.messages)


def test_plain_chat_is_neither_constrained_nor_changed() -> None:
    asked: list[Message] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi!"},
        {"role": "user", "content": "Action: finish(1)?"},
    ]
    trajectory, (request,) = run(["It is\n one. "], Task(messages=asked, tools=[]))
    assert request.messages == asked
    assert request.regex is None
    assert (trajectory.answer, trajectory.stop_reason) == ("It is\n one. ", StopReason.ANSWER)
    assert trajectory.messages == [*asked, {"role": "assistant", "content": "It is\n one. "}]
    assert trajectory.outcome is None


def test_an_empty_reply_in_plain_chat_ends_the_run_without_a_word_about_actions() -> None:
    trajectory, requests = run(["  "], Task(messages=[{"role": "user", "content": "Hello"}], tools=[]))
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.MALFORMED, None)
    assert len(requests) == 1


def test_plain_chat_that_was_cut_says_so() -> None:
    class Cut(ScriptedModel):
        async def complete(self, request: ChatRequest) -> ChatReply:
            return ChatReply(text="It is", finish_reason="length")

    trajectory, _ = run(Cut([]), Task(messages=[{"role": "user", "content": "Hello"}], tools=[]))
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.LENGTH, "It is")


def test_the_grammar_leaves_room_to_close_the_line_inside_the_token_budget() -> None:
    _, (request,) = run(["Action: finish(51)"], sampling={"max_tokens": 40, "temperature": 0.7})
    assert request.sampling == {"max_tokens": 40, "temperature": 0.7}
    assert re.fullmatch(request.regex or "", f"Action: calc({'1' * 28})")
    assert not re.fullmatch(request.regex or "", f"Action: calc({'1' * 29})")


def test_an_operator_can_leave_the_model_unconstrained() -> None:
    _, (request,) = run(["Action: finish(51)"], constrain=False)
    assert request.regex is None


def test_a_repeated_call_and_the_last_turn_leave_only_an_answer() -> None:
    model = ScriptedModel(["Action: calc(1+1)", "Action: calc(2+2)", "Action: calc(1+1)", "Action: finish(2)"])
    deps = AgentDeps(llm=model, config=AgentConfig(max_turns=9))
    asyncio.run(run_task(SUM, ModelRef(0, "base"), deps, purpose=Purpose.SERVE))
    assert [bool(re.fullmatch(r.regex or "", "Action: calc(3)")) for r in model.requests] == [True, True, True, False]

    model = ScriptedModel(["Action: calc(1+1)", "Action: finish(2)"])
    deps = AgentDeps(llm=model, config=AgentConfig(max_turns=2))
    asyncio.run(run_task(SUM, ModelRef(0, "base"), deps, purpose=Purpose.SERVE))
    assert [bool(re.fullmatch(r.regex or "", "Action: calc(3)")) for r in model.requests] == [True, False]
