"""From whom a night learned: whose words made its examples, who asked where nobody's did, and which teacher answered.

Counts as the caps do (`distill.dataset`), under full names: a key's author is told by its own (`key:shop/ann`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from distill.snapshot import ANONYMOUS
from distill.uploads import RECIPE as UPLOADED
from evals.night_report import Voice
from memory.ledger import Ledger
from memory.lineage import feedback_by_id, teachers_of
from memory.records import Example, Feedback, FeedbackKind, Task

Who = tuple[str, str]
"""(tenant, name)."""


def voices(ledger: Ledger, examples: Sequence[Example], *, named: bool) -> list[Voice]:
    """Everybody behind the examples, those with the most first. Not `named`: under numbers; who named nobody is
    anonymous to every reader."""
    words: dict[str, Feedback] = {}
    teachers: dict[str, str] = {}
    for tenant in sorted({e.tenant for e in examples}):
        ids = {id for e in examples if e.tenant == tenant for id in e.sources}
        words |= feedback_by_id(ledger.database, ids, tenant=tenant)
        teachers |= teachers_of(ledger.database, ids, tenant=tenant)
    tasks = ledger.tasks({e.task_id for e in examples})
    behind: dict[Who, list[int]] = {}
    for example in examples:
        for who in _behind(example, words, teachers, tasks):
            behind.setdefault(who, [0, 0])[0] += 1
    for word in words.values():
        behind[word.tenant, word.author][1] += word.kind is FeedbackKind.CORRECTION
    ordered = sorted(behind.items(), key=lambda item: (-item[1][0], item[0]))
    tenants, told = {tenant for tenant, _ in behind}, list[Voice]()
    for number, ((tenant, name), (count, corrections)) in enumerate(ordered, 1):
        who = f"{name} of {tenant}" if named and len(tenants) > 1 else name
        hidden = not named and name != ANONYMOUS
        told.append(Voice(who=f"author {number}" if hidden else who, examples=count, corrections=corrections))
    return told


def _behind(
    example: Example, words: Mapping[str, Feedback], teachers: Mapping[str, str], tasks: Mapping[str, Task]
) -> set[Who]:
    if example.recipe == UPLOADED:
        return {(example.tenant, f"file {name}") for name in example.sources}
    said = [words[id] for id in example.sources if id in words]
    found = {(word.tenant, word.author) for word in said}
    found |= {(example.tenant, teachers[id]) for id in example.sources if id in teachers}
    task = tasks.get(example.task_id)
    # What rests on nobody's word rests on the reference that came with the request; a hint is no such word.
    if task is not None and all(word.kind is FeedbackKind.HINT for word in said):
        found.add((task.tenant, task.asker or ANONYMOUS))
    return found
