"""Two principles are one when a model says so, and only then."""

from __future__ import annotations

import asyncio
import re

import pytest

from distill.equivalence import YES_OR_NO, first_equivalent, same_advice
from memory.errors import ModelError
from memory.records import Principle, PrincipleKind


def rule(text: str) -> Principle:
    return Principle(kind=PrincipleKind.GUIDING, text=text)


NEW, NEAR, FAR = rule("Check the units first."), rule("First of all, check units."), rule("Sort by length.")


def judge(*replies: str | Exception):
    asked: list[str] = []

    async def ask(prompt: str, regex: str | None) -> str:
        assert regex == YES_OR_NO
        reply = replies[len(asked)]
        asked.append(prompt)
        if isinstance(reply, Exception):
            raise reply
        return reply

    return ask, asked


@pytest.mark.parametrize(
    ("reply", "same"),
    [
        ("Yes", True),
        (" yes.\n", True),
        ("No", False),
        ("Yes and no", False),
        ("Yesterday", False),
        ("", False),
        (ModelError("down"), False),
    ],
)
def test_only_a_plain_yes_makes_two_principles_one(reply: str | Exception, same: bool):
    ask, asked = judge(reply)
    assert asyncio.run(same_advice(ask, NEW, NEAR)) is same
    assert NEW.text in asked[0]
    assert NEAR.text in asked[0]


def test_the_first_neighbour_that_says_the_same_is_taken_and_no_further_one_asked():
    ask, asked = judge("No", "Yes", "Yes")
    assert asyncio.run(first_equivalent(ask, NEW, [FAR, NEAR, NEW])) is NEAR
    assert len(asked) == 2
    ask, _ = judge("No", "No")
    assert asyncio.run(first_equivalent(ask, NEW, [FAR, NEAR])) is None


def test_the_regex_admits_both_answers_and_nothing_else():
    assert [word for word in ("Yes", "No", "yes", "Maybe", "YesNo") if re.fullmatch(YES_OR_NO, word)] == ["Yes", "No"]
