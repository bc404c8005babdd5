"""What a run says while it goes on, for those who watch it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TextDelta:
    """A piece of the answer. The pieces of a run together are its answer."""

    text: str


@dataclass(frozen=True)
class ToolCallDelta:
    """A call, or the next piece of its arguments, of a tool that the client runs."""

    index: int
    id: str
    name: str
    arguments: str


@dataclass(frozen=True)
class Watched:
    """What the agent did on its way (recall, its own tools), for clients that asked to watch."""

    event: dict[str, Any]


Emit = Callable[[TextDelta | ToolCallDelta | Watched], None]
"""Takes an event at once and never waits."""
