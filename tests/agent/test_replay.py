"""A finished run's model calls, made again from its trajectory."""

from __future__ import annotations

import asyncio

from agent.llm import ScriptedModel
from agent.replay import model_calls
from agent.run import run_task
from agent.state import AgentConfig, AgentDeps, ModelRef
from memory.records import Purpose, Task


def test_the_calls_of_a_run_are_those_that_the_model_got() -> None:
    model = ScriptedModel(["Action: calc(1 + 2)", "no action", "Action: calc(1 + 2)", "Action: finish(3)"])
    config = AgentConfig(max_turns=4)
    task = Task(tenant="school", messages=[{"role": "user", "content": "What is 1 + 2?"}])
    deps = AgentDeps(llm=model, config=config)
    run = asyncio.run(run_task(task, ModelRef(0, "base"), deps, purpose=Purpose.SERVE, sampling={"max_tokens": 40}))
    assert len(model.requests) > 1
    assert model_calls(run, config) == model.requests
