"""Whether two principles say the same, by a model's word (EvolveR, arXiv 2510.16079 §3).

Owns the question and the reading of its answer. Owns neither the search for neighbours nor the merging (`memory`).
"""

from __future__ import annotations

from collections.abc import Sequence

from distill.principles import Ask
from memory.errors import ModelError
from memory.records import Principle

MAX_TOKENS = 8
YES_OR_NO = "Yes|No"

_PROMPT = """Two lessons for an agent:
1. {one}
2. {other}
Do both give the same advice for the same situations, so that one of them can be dropped? Reply with Yes or No.
"""


async def same_advice(ask: Ask, one: Principle, other: Principle) -> bool:
    """Whether the model calls them equivalent. A reply that is neither Yes nor No, or none, counts as No."""
    try:
        reply = await ask(_PROMPT.format(one=one.text, other=other.text), YES_OR_NO)
    except ModelError:
        return False
    return reply.strip().strip(".!*\"'").casefold() == "yes"


async def first_equivalent(ask: Ask, principle: Principle, neighbours: Sequence[Principle]) -> Principle | None:
    """The first of the neighbours, nearest first, that says the same; None when none does."""
    for neighbour in neighbours:
        if await same_advice(ask, principle, neighbour):
            return neighbour
    return None
