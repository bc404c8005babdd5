"""Rehearsal: the base model's own words, whole ones only, and nothing of the exam."""

from __future__ import annotations

import asyncio

from distill.rehearsal import PROMPTS, rehearse
from evals.chat import chat_suite
from memory.errors import ModelUnavailableError
from memory.records import ExampleKind, Message, text_of


def test_every_whole_answer_becomes_a_plain_chat_example() -> None:
    async def answer(messages: list[Message]) -> str | None:
        said = text_of(messages[-1])
        if said == PROMPTS[0]:
            return None
        if said == PROMPTS[1]:
            raise ModelUnavailableError("away")
        return f"About {said}"

    examples = asyncio.run(rehearse(answer, 10))
    assert [e.messages[0]["content"] for e in examples] == list(PROMPTS[2:10])
    assert all(e.kind is ExampleKind.SFT and e.tools == [] and len(e.messages) == 2 for e in examples)
    assert [e.id for e in examples] == [e.id for e in asyncio.run(rehearse(answer, 10))]


def test_no_prompt_is_asked_in_the_chat_control() -> None:
    asked = {item.task.question for item in chat_suite(40).tasks}
    assert not asked & set(PROMPTS)
    assert len(set(PROMPTS)) == len(PROMPTS)
