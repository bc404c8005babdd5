"""A run that is listened to: what is said while it goes on is what it answers, to the letter."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.codec import settled_answer
from agent.events import TextDelta, ToolCallDelta, Watched
from agent.llm import ChatReply, ChatRequest, ScriptedModel
from agent.run import run_task
from agent.state import AgentConfig, AgentDeps, ModelRef, RunOptions
from memory.records import Message, Purpose, StopReason, Task, Trajectory

QUESTION: list[Message] = [{"role": "user", "content": "What is 17 * 3?"}]
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}

escapes = st.from_regex(r"([ab]|\\n|\\\\|\\|[()]| |\n)+", fullmatch=True)
answers = st.one_of(st.text(), escapes, st.text(alphabet="ab()\\n \n\t'\"Action: finish"))
lines = st.one_of(
    answers,
    answers.map(lambda said: f"Action: finish({said})"),
    answers.map(lambda said: f" Action:finish({said}) \n"),
    answers.map(lambda said: f"Action: finish({said}"),
)


class InPieces(ScriptedModel):
    """A model whose replies come in pieces of these lengths, with this finish reason."""

    lengths: Sequence[int] = (1,)
    finish: str = "stop"

    async def stream(self, request: ChatRequest) -> AsyncIterator[str | ChatReply]:
        reply = await self.complete(request)
        rest, turn = reply.text, 0
        while rest:
            length = self.lengths[turn % len(self.lengths)]
            yield rest[:length]
            rest, turn = rest[length:], turn + 1
        yield ChatReply(text=reply.text, finish_reason=self.finish, completion_tokens=1)


def listen(
    replies: Sequence[str | Exception],
    *,
    tools: list[str] | None = None,
    client_tools: list[dict[str, Any]] | None = None,
    lengths: Sequence[int] = (1,),
    finish: str = "stop",
    sampling: dict[str, Any] | None = None,
    constrain: bool = True,
    **options: Any,
) -> tuple[Trajectory, list[Any], InPieces]:
    model = InPieces(replies)
    model.lengths, model.finish = lengths, finish
    heard: list[Any] = []
    task = Task(messages=QUESTION, tools=tools, client_tools=client_tools or [])
    deps = AgentDeps(llm=model, config=AgentConfig(constrain=constrain))
    running = run_task(
        task,
        ModelRef(0, "base"),
        deps,
        purpose=Purpose.SERVE,
        sampling=sampling,
        options=RunOptions(emit=heard.append, accept_cut=True, **options),
    )
    return asyncio.run(running), heard, model


def text_of(heard: list[Any]) -> str:
    return "".join(event.text for event in heard if isinstance(event, TextDelta))


@settings(deadline=None, max_examples=300)
@given(
    st.lists(lines, min_size=1, max_size=2),
    st.lists(st.integers(1, 5), min_size=1, max_size=3),
    st.sampled_from([["calculator"], ["python"], []]),
    st.sampled_from(["stop", "length"]),
    st.sampled_from([None, "a", ["b(", "ab", "nnnn"]]),
    st.booleans(),
)
def test_the_pieces_are_the_answer(
    replies: list[str], lengths: list[int], tools: list[str], finish: str, stop: Any, constrain: bool
) -> None:
    trajectory, heard, _ = listen(
        [*replies, "Action: finish(7)"][:2] if len(replies) > 1 else [*replies, "Action: finish(7)"],
        tools=tools,
        lengths=lengths,
        finish=finish,
        sampling={"stop": stop} if stop and tools else None,
        constrain=constrain,
    )
    assert text_of(heard) == (trajectory.answer or "")


@settings(max_examples=300)
@given(lines, st.sampled_from([["calculator"], ["python"], []]))
def test_what_is_certain_of_an_answer_only_grows(text: str, tools: list[str]) -> None:
    settled = [settled_answer(text[:end], tools) for end in range(len(text) + 1)]
    assert all(later.startswith(earlier) for earlier, later in itertools.pairwise(settled))


def test_an_answer_is_said_while_it_is_generated_and_a_tools_line_never() -> None:
    _, heard, _ = listen(["Action: calc(17*3)", "Action: finish(It is 51 (fifty-one).)"], lengths=(4,))
    pieces = [event.text for event in heard if isinstance(event, TextDelta)]
    assert len(pieces) > 3
    assert "".join(pieces) == "It is 51 (fifty-one)."


def test_whoever_watches_hears_what_was_recalled_called_and_observed() -> None:
    _, heard, _ = listen(["Action: calc(17*3)", "Action: finish(51)"])
    watched = [event.event for event in heard if isinstance(event, Watched)]
    assert [event["event"] for event in watched] == ["recall", "tool_call", "observation"]
    assert (watched[1]["name"], watched[2]["content"]) == ("calculator", "51")
    assert watched[1]["id"] == watched[2]["id"]


def test_a_malformed_line_is_not_heard() -> None:
    trajectory, heard, _ = listen(["The answer is 51", "Action: finish(51)"])
    assert text_of(heard) == trajectory.answer == "51"


def test_an_answer_that_runs_out_of_tokens_is_given_as_far_as_it_came() -> None:
    trajectory, heard, model = listen(["Action: finish(It is about fif"], finish="length")
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.LENGTH, "It is about fif")
    assert text_of(heard) == trajectory.answer
    assert len(model.requests) == 1


def test_stop_sequences_end_the_answer_and_not_a_tools_line() -> None:
    trajectory, heard, model = listen(
        ["Action: calc(1+2)", "Action: finish(one. two. three)"], sampling={"stop": [")", ". t"]}
    )
    assert trajectory.answer == text_of(heard) == "one"
    assert all("stop" not in request.sampling for request in model.requests)
    _, _, model = listen(["plain"], tools=[], sampling={"stop": "x"})
    assert model.requests[0].sampling["stop"] == "x"


def test_a_clients_tool_ends_the_run_with_its_call() -> None:
    line = 'Action: get_weather({"city": "Paris"})'
    trajectory, heard, model = listen([line], tools=[], client_tools=[WEATHER])
    assert (trajectory.stop_reason, trajectory.answer) == (StopReason.TOOL_CALLS, None)
    (call,) = trajectory.messages[-1]["tool_calls"]
    (said,) = [event for event in heard if isinstance(event, ToolCallDelta)]
    assert said == ToolCallDelta(0, call["id"], "get_weather", '{"city": "Paris"}')
    assert trajectory.id.removeprefix("traj_") in call["id"]
    assert trajectory.client_tools == [WEATHER]
    assert 'get_weather({"city": string})' in model.requests[0].messages[0]["content"]
    assert text_of(heard) == ""


def test_arguments_that_do_not_fit_are_reminded_of() -> None:
    replies = ['Action: get_weather({"town": "Paris"})', 'Action: get_weather({"city": "Paris"})']
    trajectory, _, model = listen(replies, tools=[], client_tools=[WEATHER])
    assert trajectory.stop_reason is StopReason.TOOL_CALLS
    assert len(model.requests) == 2


@pytest.mark.parametrize("constrain", [True, False])
def test_where_a_call_is_required_an_answer_is_no_action(constrain: bool) -> None:
    replies = ["Action: finish(sunny)", 'Action: get_weather({"city": "Paris"})']
    trajectory, heard, _ = listen(replies, tools=[], client_tools=[WEATHER], must_call=True, constrain=constrain)
    assert trajectory.stop_reason is StopReason.TOOL_CALLS
    assert text_of(heard) == ""


def test_the_run_after_a_clients_tools_goes_on_where_the_first_stopped() -> None:
    first, _, asked = listen(['Action: get_weather({"city": "Paris"})'], tools=[], client_tools=[WEATHER])
    call = first.messages[-1]
    result: Message = {"role": "tool", "tool_call_id": call["tool_calls"][0]["id"], "content": "sunny"}
    task = Task(messages=[*QUESTION, call, result], tools=[], client_tools=[WEATHER])
    model = ScriptedModel(["Action: finish(It is sunny.)"])
    second = asyncio.run(
        run_task(
            task,
            ModelRef(0, "base"),
            AgentDeps(llm=model, config=AgentConfig(max_turns=1)),
            purpose=Purpose.SERVE,
            options=RunOptions(before=first, conversation_id="conv"),
        )
    )
    assert (second.continues, second.conversation_id, second.inherited_steps) == (first.id, "conv", 1)
    assert second.messages[: len(first.messages)] == first.messages
    assert second.messages[len(first.messages) :] == [result, {"role": "assistant", "content": "It is sunny."}]
    assert second.steps[0] == first.steps[0]
    assert model.requests[0].messages[:-2] == asked.requests[0].messages
    assert model.requests[0].messages[-1]["content"] == "Observation: sunny"


def test_a_cache_key_splits_the_tenants_cache() -> None:
    salts = [listen(["Action: finish(1)"], cache_key=key)[2].requests[0].cache_salt for key in (None, "a", "b")]
    assert len(set(salts)) == 3
    assert salts[0] == "default"
