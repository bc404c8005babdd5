"""Rehearsal: the base model's own words, whole ones only, and nothing of the exam."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from pydantic import ValidationError

from distill.rehearsal import PROMPTS, Answer, rehearse
from evals.chat import chat_suite
from memory.errors import ModelUnavailableError
from memory.records import ExampleKind, Message, text_of
from serve.settings import NightConfig


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


def test_what_the_base_model_said_is_asked_once_and_said_again(tmp_path: Path) -> None:
    asked: list[str] = []

    def telling(tale: str, away: str | None = None) -> Answer:
        async def answer(messages: list[Message]) -> str | None:
            said = text_of(messages[-1])
            asked.append(said)
            if said == away:
                raise ModelUnavailableError("away")
            return None if said == PROMPTS[0] else f"{tale} {said}"

        return answer

    kept = tmp_path / "rehearsal" / "of_a_model.json"
    first = asyncio.run(rehearse(telling("First:", away=PROMPTS[1]), 4, kept))
    assert [e.messages[0]["content"] for e in first] == list(PROMPTS[2:4])
    asked.clear()
    second = asyncio.run(rehearse(telling("Second:"), 5, kept))
    assert set(asked) == {PROMPTS[1], PROMPTS[4]}, "an answer without an end is one too, a broken engine's is not"
    assert [e for e in second if e.messages[0]["content"] in PROMPTS[2:4]] == first
    asked.clear()
    assert asyncio.run(rehearse(telling("Third:"), 5, kept)) == second
    assert not asked
    assert list(kept.parent.iterdir()) == [kept]
    kept.write_text("half a li")
    assert len(asyncio.run(rehearse(telling("Fourth:"), 5, kept))) == 4


def test_more_prompts_than_there_are_cannot_be_asked_for() -> None:
    assert NightConfig().rehearsal <= len(PROMPTS)
    with pytest.raises(ValidationError, match=f"less than or equal to {len(PROMPTS)}"):
        NightConfig(rehearsal=len(PROMPTS) + 1)


def test_no_prompt_is_asked_in_the_chat_control() -> None:
    asked = {item.task.question for item in chat_suite(40).tasks}
    assert not asked & set(PROMPTS)
    assert len(set(PROMPTS)) == len(PROMPTS)
