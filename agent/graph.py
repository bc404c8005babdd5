"""The agent as a LangGraph: recall -> act <-> tools, act -> check -> (act once more | end).

Owns the control flow of one run. Tool execution, prompts, the codec and memory have rooms of their own.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from agent.codec import Action, assistant_message, grammar, parse, wire
from agent.llm import ChatReply, ChatRequest
from agent.prompts import compose, showable
from agent.state import RunContext, RunState
from agent.tools import call_tool
from memory.records import MALFORMED, RECALLED, Message, Step, StopReason, Task

ACTION_OVERHEAD_TOKENS = 12
"""What `Action: finish()` and the end of turn take of a call's token budget."""

REMINDER: Message = {"role": "user", "content": "That was no action. Reply with exactly one line: Action: ..."}


@lru_cache(maxsize=8)
def build_graph(checkpointer: Any = None) -> Any:
    """The compiled graph; with a checkpointer every step is saved under the run's thread id."""
    from langgraph.graph import END, START, StateGraph

    graph = StateGraph(RunState, context_schema=RunContext)
    graph.add_node("recall", _recall)
    graph.add_node("act", _act)
    graph.add_node("tools", _tools)
    graph.add_node("check", _check)
    graph.add_edge(START, "recall")
    graph.add_edge("recall", "act")
    graph.add_conditional_edges("act", _after_act, {"tools": "tools", "check": "check"})
    graph.add_edge("tools", "act")
    graph.add_conditional_edges("check", _after_check, {"act": "act", "end": END})
    return graph.compile(checkpointer=checkpointer)


async def _recall(state: RunState, runtime: Any) -> dict[str, Any]:
    import asyncio

    context: RunContext = runtime.context
    task = Task.model_validate(state["task"])
    recall = showable(await asyncio.to_thread(context.deps.recaller.recall, task), context.tools)
    return {
        "messages": compose(task, context.tools, recall),
        "recalled": [item.model_dump(mode="json") for item in recall.items],
        "steps": [],
        "reminded": False,
    }


async def _act(state: RunState, runtime: Any) -> dict[str, Any]:
    context: RunContext = runtime.context
    tools, messages = context.tools, state["messages"]
    budget = int(context.sampling.get("max_tokens") or context.deps.config.max_tokens)
    must_answer = len(state["steps"]) == context.deps.config.max_turns - 1 or _repeats_itself(messages)
    regex = grammar(tools, max(8, budget - ACTION_OVERHEAD_TOKENS), answer_only=must_answer)
    request = ChatRequest(
        model=context.model.name,
        messages=wire(messages, tools),
        sampling=context.sampling,
        regex=regex if context.deps.config.constrain else None,
        cache_salt=state["task"]["tenant"],
    )
    reply = await context.deps.llm.complete(request)
    action = _read(reply, tools)
    said: Message = (
        {"role": "assistant", "content": reply.text, "name": MALFORMED} if action is None else assistant_message(action)
    )
    steps = [*state["steps"], _step(reply, len(messages)).model_dump(mode="json")]
    update: dict[str, Any] = {"messages": [*messages, said], "steps": steps, "answer": None, "stop_reason": None}
    if action is None:
        update["stop_reason"] = StopReason.MALFORMED.value
    elif action.tool is None:
        update["answer"] = (action.answer or "").strip() if tools else action.answer
        cut = not tools and reply.finish_reason == "length"
        update["stop_reason"] = (StopReason.LENGTH if cut else StopReason.ANSWER).value
    elif _spent(steps, context):
        update["stop_reason"] = StopReason.MAX_TURNS.value
    return update


def _repeats_itself(messages: list[Message]) -> bool:
    """The run's last tool call was made before: it brought nothing new, so an answer is due."""
    own = [m for m in messages if m.get("name") != RECALLED]
    made = [call["function"] for m in own for call in m.get("tool_calls") or []]
    return bool(made) and made[-1] in made[:-1]


def _read(reply: ChatReply, tools: list[str]) -> Action | None:
    if tools:
        return parse(reply.text, tools)
    return Action(tool=None, arguments={}, answer=reply.text) if reply.text.strip() else None


def _step(reply: ChatReply, message: int) -> Step:
    return Step(
        message=message,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        prompt_token_ids=reply.prompt_token_ids,
        token_ids=reply.token_ids,
        logprob=reply.logprob,
        finish_reason=reply.finish_reason,
        seconds=reply.seconds,
    )


def _spent(steps: list[dict[str, Any]], context: RunContext) -> bool:
    config = context.deps.config
    tokens = sum(step["completion_tokens"] or 0 for step in steps)
    return len(steps) >= config.max_turns or tokens >= config.max_run_tokens


async def _tools(state: RunState, runtime: Any) -> dict[str, Any]:
    import json

    messages = list(state["messages"])
    for call in messages[-1]["tool_calls"]:
        function = call["function"]
        observation = await call_tool(function["name"], json.loads(function["arguments"]))
        messages.append({"role": "tool", "tool_call_id": call["id"], "content": observation})
    return {"messages": messages}


async def _check(state: RunState, runtime: Any) -> dict[str, Any]:
    """Look at the form of the answer only: a look at the reference would be an oracle's retry."""
    if (
        state["stop_reason"] == StopReason.MALFORMED
        and runtime.context.tools
        and not state["reminded"]
        and not _spent(state["steps"], runtime.context)
    ):
        return {"messages": [*state["messages"], REMINDER], "reminded": True, "stop_reason": None}
    return {}


def _after_act(state: RunState) -> str:
    return "check" if state["stop_reason"] else "tools"


def _after_check(state: RunState) -> str:
    return "end" if state["stop_reason"] else "act"
