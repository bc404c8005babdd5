"""The service's own tools, by name, with their OpenAI schemas.

A tool takes the argument the model gave and returns text; a ToolError's text is what the model reads
instead. Those that look things up are handed the run that asks. Tools of a client never come here: the client runs
them itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.calculator import calculate
from agent.lookup import Context, Observation, search_experience, search_knowledge
from agent.sandbox import run_python
from memory.errors import ConfigError, ModelError, ToolError


@dataclass(frozen=True)
class Tool:
    """A tool with one string argument. `run` may block; it is called in a thread."""

    name: str
    description: str
    argument: str
    run: Callable[[str], str] | Callable[[str, Context], Observation]
    looks_up: bool = False
    """It reads memory or documents for the run (`run` takes its context): what it shows is never distilled from."""
    replayable: bool = True
    """Has no side effect and finds the same again, so a night may run it again."""

    @property
    def schema(self) -> dict[str, Any]:
        """OpenAI's function schema."""
        parameters = {
            "type": "object",
            "properties": {self.argument: {"type": "string"}},
            "required": [self.argument],
            "additionalProperties": False,
        }
        function = {"name": self.name, "description": self.description, "parameters": parameters}
        return {"type": "function", "function": function}


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        Tool("calculator", "Exact arithmetic, gcd, lcm, count(letter, text), solve(equation)", "expression", calculate),
        Tool("python", "Run Python without files or network and read what it prints", "code", run_python),
        Tool(
            "search_knowledge",
            "Passages of the user's documents about a question, with source and place",
            "query",
            search_knowledge,
            looks_up=True,
            replayable=False,
        ),
        Tool(
            "search_experience",
            "Lessons and solved tasks that are like a question",
            "query",
            search_experience,
            looks_up=True,
            replayable=False,
        ),
    )
}

LOOKUPS = frozenset(name for name, tool in TOOLS.items() if tool.looks_up)


def check_tools(names: list[str]) -> list[str]:
    """The names as given; ConfigError when one is unknown."""
    for name in names:
        if name not in TOOLS:
            raise ConfigError(f"unknown tool {name!r}; known: {', '.join(sorted(TOOLS))}")
    return names


async def call_tool(name: str, arguments: dict[str, Any], context: Context | None = None) -> Observation:
    """What one call showed: the result, or `error: …` when the tool refused. Never raises ToolError.

    `context`: the run that asks; without one nothing can be looked up.
    """
    tool = TOOLS[name]
    value = arguments.get(tool.argument)
    if not isinstance(value, str):
        return Observation(f"error: {name} needs the argument {tool.argument!r}")
    run: Any = tool.run
    try:
        if not tool.looks_up:
            return Observation(await asyncio.to_thread(run, value))
        if context is None:
            raise ToolError(f"{name} works in a run only")
        return await asyncio.to_thread(run, value, context)
    except (ToolError, ModelError) as exc:
        return Observation(f"error: {exc}")
