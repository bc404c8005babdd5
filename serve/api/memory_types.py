"""The shapes of `/v1/memory`'s successful replies, for the OpenAPI document."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel


class MemoryItem(BaseModel):
    """A principle or a past run; `kind` and `structure` are a principle's, `task_id` and `messages` a run's."""

    id: str
    object: Literal["memory.item"]
    type: Literal["principle", "run"]
    tenant: str
    workload: str
    text: str
    status: Literal["active", "merged", "retired", "internalised"]
    pinned: bool
    merged_into: str | None
    uses: int
    successes: int
    score: float
    sources: list[str]
    created_at: str
    kind: Literal["guiding", "cautionary"] | None = None
    structure: list[list[str]] | None = None
    task_id: str | None = None
    messages: list[dict[str, Any]] | None = None


class MemoryHit(MemoryItem):
    """An item that was searched for, with its cosine to the query."""

    similarity: float


class Runs(BaseModel):
    """Judged runs."""

    runs: int
    successes: int


class MemoryDetail(MemoryItem):
    """An item with what it is worth and what happened to it."""

    shown: Runs
    withheld: Runs
    uplift: dict[str, float] | None
    history: list[dict[str, Any]]


class MemoryStats(BaseModel):
    """A tenant's memory in figures."""

    object: Literal["memory.stats"]
    counts: list[dict[str, Any]]
    worths: list[dict[str, Any]]
    prompts: list[dict[str, Any]]
    index: Literal["ready", "rebuilding", "broken"]


class Recollection(BaseModel):
    """A run and what memory did for it: each item with the figures that chose it, and what it is worth by now."""

    object: Literal["memory.recollection"]
    id: str
    generation: int
    score: float | None
    prompt_tokens: int | None
    recalled: list[dict[str, Any]]


class MemoryImport(BaseModel):
    """Lines that were new, and lines that were here already."""

    object: Literal["memory.import"]
    added: int
    known: int


class MemoryIndex(BaseModel):
    """The index, and how many items were put into it."""

    object: Literal["memory.index"]
    state: Literal["ready", "rebuilding", "broken"]
    items: int


class ForgottenBody(BaseModel):
    """What was deleted, and what had learned from it."""

    id: str
    object: Literal["memory.forgotten"]
    tenant: str
    user: str | None
    by: str
    counts: dict[str, int]
    files: list[str]
    nights: list[str]
    generations: list[int]
    at: str
