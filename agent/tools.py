"""The service's own tools, by name, with their OpenAI schemas.

A tool takes the arguments the model gave and returns text; a ToolError's text is what the model reads
instead. Tools of a client never come here: the client runs them itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from agent.calculator import calculate
from agent.sandbox import run_python
from memory.errors import ConfigError, ToolError


@dataclass(frozen=True)
class Tool:
    """A tool with one string argument. `run` may block; it is called in a thread."""

    name: str
    description: str
    argument: str
    run: Callable[[str], str]
    replayable: bool = True
    """Has no side effect, so a night may run it again."""

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
    )
}


def check_tools(names: list[str]) -> list[str]:
    """The names as given; ConfigError when one is unknown."""
    for name in names:
        if name not in TOOLS:
            raise ConfigError(f"unknown tool {name!r}; known: {', '.join(sorted(TOOLS))}")
    return names


async def call_tool(name: str, arguments: dict[str, Any]) -> str:
    """The observation of one call: the result, or `error: …` when the tool refused. Never raises ToolError."""
    tool = TOOLS[name]
    value = arguments.get(tool.argument)
    if not isinstance(value, str):
        return f"error: {name} needs the argument {tool.argument!r}"
    try:
        return await asyncio.to_thread(tool.run, value)
    except ToolError as exc:
        return f"error: {exc}"
