"""What the graph carries from node to node, and what it is handed from outside.

The state holds only JSON types, so that a checkpoint needs no code to be read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from agent.client_tools import ClientTool
from agent.events import Emit
from agent.llm import ChatModel
from memory.library import Library, NoLibrary
from memory.recall import NoMemory, Recaller
from memory.records import Message, Trajectory


class AgentConfig(BaseModel):
    """How the agent acts when a task does not say otherwise."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    tools: list[str] = Field(default=["calculator"], description="the service's own tools offered by default")
    max_turns: int = Field(default=4, ge=1, le=64, description="model calls in one run")
    max_tokens: int = Field(default=72, ge=16, description="completion tokens of one model call")
    max_run_tokens: int = Field(default=4096, ge=64, description="completion tokens of one run")
    temperature: float = Field(default=0.0, ge=0.0, le=2.0, description="0 is greedy")
    constrain: bool = Field(default=True, description="let the engine enforce the action grammar")


@dataclass(frozen=True)
class ModelRef:
    """Who answers: a generation's number and the engine's immutable name for it."""

    generation: int
    name: str


@dataclass(frozen=True)
class AgentDeps:
    """Everything the agent needs from outside; `serve.wiring` builds it."""

    llm: ChatModel
    recaller: Recaller = field(default_factory=NoMemory)
    library: Library = field(default_factory=NoLibrary)
    config: AgentConfig = field(default_factory=AgentConfig)
    checkpointer: Any = None
    """A LangGraph checkpointer, or None for runs that are cheaper to repeat than to save."""
    withhold_share: float = 0.0
    """Share of the served runs from which a recalled item is withheld, to measure it; evaluations get everything."""


@dataclass(frozen=True)
class RunOptions:
    """What a served request may say beyond its task; evaluation leaves it all as it is."""

    emit: Emit | None = None
    """Called with the answer as it is generated, with calls of the client's tools, and with what to watch."""
    before: Trajectory | None = None
    """The run that ended in the client's tool calls which this task answers: it goes on where that one stopped."""
    may_call: frozenset[str] | None = None
    """The client's tools that may be called now; None = all of the task's."""
    must_call: bool = False
    """Only a call of a client's tool ends the run."""
    accept_cut: bool = False
    """An answer that ran out of tokens is given as far as it came, instead of asking the model again."""
    cache_key: str | None = None
    """Splits a tenant's prefix cache further."""
    conversation_id: str | None = None


@dataclass(frozen=True)
class RunContext:
    """LangGraph's runtime context of one run."""

    deps: AgentDeps
    model: ModelRef
    sampling: dict[str, Any]
    tools: list[str]
    """Ours and the client's, see `codec.offered`."""
    run_id: str = "traj_0"
    client: tuple[ClientTool, ...] = ()
    """The client's tools that may be called now."""
    withhold_share: float = 0.0
    options: RunOptions = field(default_factory=RunOptions)

    @property
    def inherited(self) -> int:
        """Steps that the predecessor made."""
        return len(self.options.before.steps) if self.options.before else 0


class RunState(TypedDict):
    """What the nodes pass on; each returns the part that it changes. `task`, `recalled`, `consulted`, `steps`: dumped
    records."""

    task: dict[str, Any]
    model: str
    """Whose turns these are: nobody else goes on with them."""
    messages: list[Message]
    recalled: list[dict[str, Any]]
    consulted: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    answer: str | None
    stop_reason: str | None
    reminded: bool
