"""What the agent asked the model in a finished run: the same calls, to be sent to an engine without the agent."""

from __future__ import annotations

from agent.client_tools import tools_of
from agent.codec import offered
from agent.graph import model_call
from agent.llm import ChatRequest, ScriptedModel
from agent.state import AgentConfig, AgentDeps, ModelRef, RunContext
from memory.records import Trajectory


def model_calls(run: Trajectory, config: AgentConfig) -> list[ChatRequest]:
    """The calls of the run's own steps, in order. `config`: the agent's, as it was then."""
    context = RunContext(
        deps=AgentDeps(llm=ScriptedModel([]), config=config),
        model=ModelRef(generation=run.generation, name=run.model),
        sampling=run.sampling,
        tools=offered(run.tools, run.client_tools),
        run_id=run.id,
        client=tuple(tools_of(run.client_tools)),
    )
    own = run.steps[run.inherited_steps :]
    return [model_call(run.messages[: step.message], i, run.tenant, context) for i, step in enumerate(own)]
