"""What the graph carries from node to node, and what it is handed from outside.

The state holds only JSON types, so that a checkpoint needs no code to be read back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, TypedDict

from pydantic import BaseModel, ConfigDict, Field

from agent.llm import ChatModel
from memory.recall import NoMemory, Recaller
from memory.records import Message


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
    config: AgentConfig = field(default_factory=AgentConfig)
    checkpointer: Any = None
    """A LangGraph checkpointer, or None for runs that are cheaper to repeat than to save."""


@dataclass(frozen=True)
class RunContext:
    """LangGraph's runtime context of one run."""

    deps: AgentDeps
    model: ModelRef
    sampling: dict[str, Any]
    tools: list[str]


class RunState(TypedDict):
    """What the nodes pass on; each returns the part that it changes. `task`, `recalled`, `steps`: dumped records."""

    task: dict[str, Any]
    messages: list[Message]
    recalled: list[dict[str, Any]]
    steps: list[dict[str, Any]]
    answer: str | None
    stop_reason: str | None
    reminded: bool
