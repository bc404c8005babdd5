"""The agent as a LangGraph: recall -> act <-> tools, act -> check -> (act once more | end).

Owns the control flow of one run. Tool execution, prompts, the codec and memory have rooms of their own.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import aclosing
from functools import lru_cache
from types import SimpleNamespace
from typing import Any

from agent.client_tools import call_id
from agent.codec import Action, assistant_message, cut_answer, grammar, parse, settled_answer, wire
from agent.events import TextDelta, ToolCallDelta, Watched
from agent.llm import ChatReply, ChatRequest
from agent.lookup import Context
from agent.prompts import compose, showable
from agent.state import RunContext, RunState
from agent.tools import LOOKUPS, call_tool
from memory.errors import ModelError
from memory.recall import NoMemory, Recall, withhold
from memory.records import LOOKED_UP, MALFORMED, RECALLED, Message, Step, StopReason, Task, content_hash

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


async def run_plain(task: dict[str, Any], context: RunContext) -> AsyncIterator[dict[str, Any]]:
    """The states of a run without tools. It is one call: the graph's nodes in their order, without its machinery,
    which costs more than all else that a plain-model request takes.
    """
    state: Any = {"task": task}
    runtime = SimpleNamespace(context=context)
    for node in (_recall, _act):
        state = state | await node(state, runtime)
        yield state


async def _recall(state: RunState, runtime: Any) -> dict[str, Any]:
    import asyncio

    context: RunContext = runtime.context
    task, before = Task.model_validate(state["task"]), context.options.before
    if before is not None:
        return {
            "messages": [*before.messages, *_news(task)],
            "recalled": [item.model_dump(mode="json") for item in before.recalled],
            "consulted": [passage.model_dump(mode="json") for passage in before.consulted],
            "steps": [step.model_dump(mode="json") for step in before.steps],
            "reminded": False,
        }
    recaller = context.deps.recaller
    found = Recall() if isinstance(recaller, NoMemory) else await asyncio.to_thread(recaller.recall, task)
    recall = withhold(showable(found, context.tools, task.client_tools), context.run_id, context.withhold_share)
    recalled = [item.model_dump(mode="json") for item in (*recall.items, *recall.withheld)]
    _watch(context, {"event": "recall", "recalled": recalled})
    return {"messages": compose(task, context.tools, recall), "recalled": recalled, "steps": [], "reminded": False}


def _news(task: Task) -> list[Message]:
    """What the client says after its last message with tool calls: their results."""
    last = max(i for i, message in enumerate(task.messages) if message.get("tool_calls"))
    return task.messages[last + 1 :]


async def _act(state: RunState, runtime: Any) -> dict[str, Any]:
    context: RunContext = runtime.context
    tools, messages, options = context.tools, state["messages"], context.options
    request = model_call(messages, len(state["steps"]) - context.inherited, state["task"]["tenant"], context)
    reply, sent = await _say(request, context)
    action = _read(reply, context)
    steps = [*state["steps"], _step(reply, len(messages)).model_dump(mode="json")]
    update: dict[str, Any] = {"steps": steps, "answer": None, "stop_reason": None}
    if action is None:
        said: Message = {"role": "assistant", "content": reply.text, "name": MALFORMED}
        update["stop_reason"] = StopReason.MALFORMED.value
        out_of_tokens = reply.finish_reason == "length"
        if sent or (options.accept_cut and out_of_tokens and not options.must_call):
            update["answer"] = _up_to_stop(cut_answer(reply.text, tools), context)
            if update["answer"] and out_of_tokens:
                update["stop_reason"] = StopReason.LENGTH.value
    else:
        said = assistant_message(action, call_id(context.run_id, len(steps) - 1) if action.client_arguments else None)
        if action.tool is None:
            update["answer"] = _up_to_stop((action.answer or "").strip(), context) if tools else action.answer
            cut = not tools and reply.finish_reason == "length"
            update["stop_reason"] = (StopReason.LENGTH if cut else StopReason.ANSWER).value
        elif action.client_arguments is not None:
            update["stop_reason"] = StopReason.TOOL_CALLS.value
        elif _spent(steps, context):
            update["stop_reason"] = StopReason.MAX_TURNS.value
    _tell(said, update["answer"], sent, context)
    return {**update, "messages": [*messages, said]}


def model_call(messages: list[Message], own_steps: int, tenant: str, context: RunContext) -> ChatRequest:
    """What the model is asked after these messages, in a run that has asked it `own_steps` times."""
    tools, options = context.tools, context.options
    budget = int(context.sampling.get("max_tokens") or context.deps.config.max_tokens)
    must_answer = own_steps == context.deps.config.max_turns - 1 or _repeats_itself(messages, tools)
    regex = grammar(
        tools,
        max(8, budget - ACTION_OVERHEAD_TOKENS),
        answer_only=must_answer,
        client=context.client,
        must_call=options.must_call,
    )
    return ChatRequest(
        model=context.model.name,
        messages=wire(messages, tools),
        # With tools a reply is a line, of which `stop` could cut off more than the answer.
        sampling={k: v for k, v in context.sampling.items() if k != "stop" or not tools},
        regex=regex if context.deps.config.constrain else None,
        cache_salt=tenant if options.cache_key is None else content_hash([tenant, options.cache_key]),
    )


async def _say(request: ChatRequest, context: RunContext) -> tuple[ChatReply, str]:
    """The model's reply, and what of the answer in it was emitted while it came."""
    emit = context.options.emit
    if emit is None:
        return await context.deps.llm.complete(request), ""
    # Where the engine does not enforce the form, a line that begins as an answer may not end as one.
    settled = not context.tools or (request.regex is not None and not context.options.must_call)
    text, sent, reply = "", "", None
    async with aclosing(context.deps.llm.stream(request)) as pieces:  # pyright: ignore[reportArgumentType]
        async for piece in pieces:
            if isinstance(piece, ChatReply):
                reply = piece
                continue
            text += piece
            ready = _before_stop(settled_answer(text, context.tools), context) if settled else ""
            if len(ready) > len(sent):
                emit(TextDelta(ready[len(sent) :]))
                sent = ready
    if reply is None:
        raise ModelError("the model's stream ended without a reply")
    return reply, sent


def _tell(said: Message, answer: str | None, sent: str, context: RunContext) -> None:
    emit = context.options.emit
    if emit is None:
        return
    if answer and len(answer) > len(sent):
        emit(TextDelta(answer[len(sent) :]))
    names = {tool.name for tool in context.client}
    for index, call in enumerate(said.get("tool_calls") or []):
        name, arguments = call["function"]["name"], call["function"]["arguments"]
        if name in names:
            emit(ToolCallDelta(index, call["id"], name, arguments))
        else:
            emit(Watched({"event": "tool_call", "id": call["id"], "name": name, "arguments": arguments}))


def _watch(context: RunContext, event: dict[str, Any]) -> None:
    if context.options.emit is not None:
        context.options.emit(Watched(event))


def _stops(context: RunContext) -> list[str]:
    stop = context.sampling.get("stop") or []
    return [s for s in ([stop] if isinstance(stop, str) else stop) if s] if context.tools else []


def _up_to_stop(answer: str | None, context: RunContext) -> str | None:
    """The answer before the first of the request's stop sequences."""
    if answer is None:
        return None
    return answer[: min([answer.find(stop) for stop in _stops(context) if stop in answer], default=len(answer))]


def _before_stop(settled: str, context: RunContext) -> str:
    """As `_up_to_stop`, less what may be the beginning of a stop sequence."""
    stops = _stops(context)
    if not stops:
        return settled
    return (_up_to_stop(settled, context) or "")[: max(0, len(settled) - max(map(len, stops)) + 1)]


def _repeats_itself(messages: list[Message], tools: list[str]) -> bool:
    """The run's last call of our own tools was made before: it brought nothing new, so an answer is due."""
    own = [m for m in messages if m.get("name") != RECALLED]
    made = [call["function"] for m in own for call in m.get("tool_calls") or []]
    return bool(made) and made[-1]["name"] in tools and made[-1] in made[:-1]


def _read(reply: ChatReply, context: RunContext) -> Action | None:
    if context.tools:
        action = parse(reply.text, context.tools, context.client)
        return None if action and action.tool is None and context.options.must_call else action
    return Action(tool=None, arguments={}, answer=reply.text) if reply.text.strip() else None


def _step(reply: ChatReply, message: int) -> Step:
    return Step(
        message=message,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        prompt_token_ids=reply.prompt_token_ids,
        token_ids=reply.token_ids,
        logprob=reply.logprob,
        logprobs=reply.logprobs,
        finish_reason=reply.finish_reason,
        seconds=reply.seconds,
    )


def _spent(steps: list[dict[str, Any]], context: RunContext) -> bool:
    config = context.deps.config
    own = steps[context.inherited :]
    tokens = sum(step["completion_tokens"] or 0 for step in own)
    return len(own) >= config.max_turns or tokens >= config.max_run_tokens


async def _tools(state: RunState, runtime: Any) -> dict[str, Any]:
    import json

    context: RunContext = runtime.context
    messages, recalled, consulted = list(state["messages"]), list(state["recalled"]), list(state.get("consulted") or [])
    for call in messages[-1]["tool_calls"]:
        function = call["function"]
        asking = _asking(state, recalled, context)
        seen = await call_tool(function["name"], json.loads(function["arguments"]), asking)
        said: Message = {"role": "tool", "tool_call_id": call["id"], "content": seen.text}
        messages.append({**said, "name": LOOKED_UP} if function["name"] in LOOKUPS else said)
        found = [item.model_dump(mode="json") for item in seen.recalled]
        recalled += found
        consulted += [passage.model_dump(mode="json") for passage in seen.consulted]
        if found:
            _watch(context, {"event": "recall", "recalled": found})
        _watch(context, {"event": "observation", "id": call["id"], "content": seen.text})
    return {"messages": messages, "recalled": recalled, "consulted": consulted}


def _asking(state: RunState, recalled: list[dict[str, Any]], context: RunContext) -> Context:
    """The run as a tool that looks things up is told of it."""
    return Context(
        task=Task.model_validate(state["task"]),
        recaller=context.deps.recaller,
        library=context.deps.library,
        tools=tuple(context.tools),
        known=frozenset(item["id"] for item in recalled),
        run_id=context.run_id,
        withhold_share=context.withhold_share,
        turn=len(state["steps"]),
    )


async def _check(state: RunState, runtime: Any) -> dict[str, Any]:
    """Look at the form of the answer only: a look at the reference would be an oracle's retry."""
    if (
        state["stop_reason"] == StopReason.MALFORMED
        and runtime.context.tools
        and not state["reminded"]
        and not state["answer"]
        and not _spent(state["steps"], runtime.context)
    ):
        return {"messages": [*state["messages"], REMINDER], "reminded": True, "stop_reason": None}
    return {}


def _after_act(state: RunState) -> str:
    return "check" if state["stop_reason"] else "tools"


def _after_check(state: RunState) -> str:
    return "end" if state["stop_reason"] else "act"
