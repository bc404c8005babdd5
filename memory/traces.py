"""Whose rows a forgetting takes, and the words by which what was made from them is known elsewhere.

Owns what counts as evidence. A word that others said too (in their messages, in their runs, in the prompts that were
laid out for them) is nobody's: by it alone nothing is taken. Owns no deletion (`memory.forget`) and no files
(`memory.scrub`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, Table, select

from memory import documents, rows
from memory.items import MODELS, Item
from memory.library import one_line
from memory.records import (
    LOOKED_UP,
    RECALLED,
    Feedback,
    FeedbackKind,
    MemoryKind,
    Message,
    PastRun,
    Principle,
    Purpose,
    Task,
    Trajectory,
    text_of,
)
from memory.schema import examples, feedback, items, tasks, trajectories
from memory.scrub import WHOLE, Needles, Wanted

SHORTEST = 8
"""A shorter text ("42", "yes") is nobody's own: it is looked for by its record's id only."""

SHORTEST_ANSWER = 24
"""The same for what the agent said, which repeats itself more."""

SHOWN = 39
"""Characters of a passage that every run showed that it was shown to: no excerpt may be set shorter."""

REHEARSAL = "rehearsal"
"""The recipe of `distill.rehearsal`: the base model's answers to our own prompts, which are nobody's words."""

BLOCK = 1 << 20
"""Characters of others' words that are looked through at once."""


@dataclass
class Traces:
    """Whose rows are to go, by id, and the words to look for elsewhere."""

    tenant: str
    user: str | None
    tasks: set[str] = field(default_factory=set[str])
    exams: set[str] = field(default_factory=set[str])
    """Those of the tasks that only a suite ever asked: the operator's words, under the tenant's name."""
    runs: set[str] = field(default_factory=set[str])
    feedback: set[str] = field(default_factory=set[str])
    items: set[str] = field(default_factory=set[str])
    documents: set[str] = field(default_factory=set[str])
    chunks: set[str] = field(default_factory=set[str])
    texts: set[str] = field(default_factory=set[str])
    common: set[str] = field(default_factory=set[str])
    """Those of the texts that others said too."""
    sentences: set[str] = field(default_factory=set[str])
    """What may stand as a line of experience in somebody's prompt: principles, and hints on a task tried again."""

    @property
    def shown(self) -> set[str]:
        """Ids of what may have been put into other people's prompts."""
        return self.items | self.documents | self.feedback

    def needles(self) -> Needles:
        """By what a trace is known."""
        ids = self.tasks | self.runs | self.feedback | self.items | self.documents | self.chunks
        return Needles(ids, self.texts - self.common)

    def wanted(self) -> Wanted:
        """The same for files."""
        asked = frozenset(self.tasks - self.exams)
        return Wanted(self.tenant, asked=asked, needles=self.needles(), said=Needles((), self.texts))

    def showed(self, run: Trajectory) -> bool:
        """Whether a run was shown something of it."""
        seen = {item.id for item in run.recalled} | {passage.document_id for passage in run.consulted}
        return bool(self.shown & seen)


def gather(connection: Connection, tenant: str, user: str | None, before: Traces | None = None) -> Traces:
    """The traces of a tenant, or of a user in it; `before`: an earlier look, whose texts were compared already."""
    traces = Traces(tenant, user)
    for task in rows.each(connection, Task, select(tasks.c.body).where(tasks.c.tenant == tenant)):
        if user is None or user in (task.user, task.safety_identifier, task.asker):
            traces.tasks.add(task.id)
    traces.exams = traces.tasks & _exams(connection, tenant)
    for task in _of(connection, tasks, Task, tasks.c.id, traces.tasks - traces.exams):
        traces.texts.update(_said(task.messages, "user"))
    for run in _of(connection, trajectories, Trajectory, trajectories.c.task_id, traces.tasks):
        traces.runs.add(run.id)
        if run.task_id not in traces.exams:
            traces.texts.update(_said(run.own_messages, "user"))
            traces.texts.update(t for t in _said(run.own_messages, "assistant") if len(t) >= SHORTEST_ANSWER)
    for said in rows.each(connection, Feedback, select(feedback.c.body).where(feedback.c.tenant == tenant)):
        # A key signs with its own name before the author's (`serve.api.auth.signature`); its name has no slash.
        if user in (None, said.author, said.author.partition("/")[2]) or said.trajectory_id in traces.runs:
            traces.feedback.add(said.id)
            traces.texts.update(t for t in _strings(said.value) if len(t) >= SHORTEST)
            if said.kind is FeedbackKind.HINT and isinstance(said.value, str):
                traces.sentences.add(" ".join(said.value.split()))
    made_from = traces.runs | traces.feedback
    for row in connection.execute(select(items.c.kind, items.c.body).where(items.c.tenant == tenant)):
        item: Item = rows.load(MODELS[MemoryKind(row.kind)], row.body)
        of_task = isinstance(item, PastRun) and item.task_id in traces.tasks
        if user is None or of_task or made_from & set(item.sources):
            traces.items.add(item.id)
            if isinstance(item, Principle):
                traces.sentences.add(item.text)
            else:
                traces.texts.update(_said(item.messages, "user"))
    traces.texts.update(t for t in traces.sentences if len(t) >= SHORTEST)
    for document, its_chunks in documents.of_user(connection, tenant, user):
        traces.documents.add(document.id)
        for chunk in its_chunks:
            traces.chunks.add(chunk.id)
            spelled = chunk.text, one_line(chunk.text)[:SHOWN]
            traces.texts.update(t for t in spelled if len(t) >= SHORTEST_ANSWER)
    known = before or Traces(tenant, user)
    if new := traces.texts - known.texts:
        traces.common = _among(new, _said_by_others(connection, traces, Needles((), new)))
    traces.common |= traces.texts & known.common
    return traces


def without_sentences(message: Message, sentences: Iterable[str]) -> Message:
    """A system message without these lines of experience; any other message as it is."""
    if message.get("role") != "system":
        return message
    content = text_of(message)
    for sentence in sentences:
        # `agent.prompts` writes "- (kind, score 0.50) sentence".
        content = re.sub(rf"^- (?:\([^)\n]*\) )?{re.escape(sentence)}(?:\n|\Z)", "", content, flags=re.MULTILINE)
    return {**message, "content": content}


def _exams(connection: Connection, tenant: str) -> set[str]:
    purposes: dict[str, set[str]] = {}
    query = select(trajectories.c.task_id, trajectories.c.purpose).where(trajectories.c.tenant == tenant).distinct()
    for row in connection.execute(query):
        purposes.setdefault(row.task_id, set()).add(row.purpose)
    return {task_id for task_id, known in purposes.items() if known == {Purpose.EVAL}}


def _said_by_others(connection: Connection, traces: Traces, new: Needles) -> Iterator[str]:
    """What was asked and said where nothing of the traces was shown."""
    mine = traces.tasks - traces.exams
    for row in connection.execute(select(tasks.c.id, tasks.c.body)):
        if row.id not in mine:
            asked = json.loads(row.body)
            yield from map(text_of, asked["messages"])
            yield from _strings(asked.get("client_tools"))
    for row in connection.execute(select(feedback.c.id, feedback.c.body)):
        if row.id not in traces.feedback:
            yield from _strings(json.loads(row.body)["value"])
    rehearsed = examples.c.body.contains(f'"recipe":"{REHEARSAL}"', autoescape=True)
    for body in connection.execute(select(examples.c.body).where(rehearsed)).scalars():
        yield from map(text_of, json.loads(body)["messages"])
    for row in connection.execute(select(trajectories.c.id, trajectories.c.body)):
        # Most runs hold none of the words, and a run is long to read.
        if row.id in traces.runs or not new.among(row.body.encode()):
            continue
        run = rows.load(Trajectory, row.body)
        if not traces.showed(run):
            yield from (text_of(m) for m in run.messages if m.get("name") not in (RECALLED, LOOKED_UP))


def _among(texts: Iterable[str], others: Iterable[str]) -> set[str]:
    """Those of the texts that stand in what others said: a short one as all of it, as it is looked for in files."""
    short = {text for text in texts if len(text) < WHOLE}
    long = {text.encode("utf-8", "surrogatepass"): text for text in texts if len(text) >= WHOLE}
    spelled, found, block, size = Needles(long.values(), ()), set[str](), list[str](), 0
    for said in others:
        if said.strip() in short:
            found.add(said.strip())
        block.append(said)
        size += len(said)
        if size > BLOCK:
            found.update(long[one] for one in spelled.among("\0".join(block).encode("utf-8", "surrogatepass")))
            block, size = [], 0
    return found | {long[one] for one in spelled.among("\0".join(block).encode("utf-8", "surrogatepass"))}


def _of(connection: Connection, table: Table, model: type[rows.R], column: Any, ids: Iterable[str]) -> Iterator[rows.R]:
    for part in rows.chunks(ids):
        yield from rows.read(connection, model, select(table.c.body).where(column.in_(part)))


def _said(messages: Iterable[Message], role: str) -> list[str]:
    return [t for m in messages if m.get("role") == role and len(t := text_of(m).strip()) >= SHORTEST]


def _strings(value: Any) -> Iterator[str]:
    """Every text inside a free-form value."""
    if isinstance(value, str):
        yield value.strip()
    elif isinstance(value, dict | list):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _strings(part)
