"""Rehearsal: the base model's own answers to general prompts, so that a night of tasks does not unlearn chat.

Self-generated targets forget least (Reinforcement Fine-Tuning Naturally Mitigates Forgetting, arXiv
2507.05386; Self-Distillation Enables Continual Learning, arXiv 2601.19897): they hold the adapter to what
the base said before, and teach nothing new. Owns the prompts; none of them is in the plain-chat control.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from memory.errors import ModelError
from memory.records import Example, ExampleKind, Message, content_hash

RECIPE = "rehearsal"

ANSWER_TOKENS = 96
"""The longest answer that may end."""

Answer = Callable[[list[Message]], Awaitable[str | None]]
"""The base model's whole answer to a conversation; None when it did not come to an end."""

PROMPTS: tuple[str, ...] = (
    "What is the capital of Spain?",
    "What is the capital of Egypt?",
    "What is the opposite of big?",
    "What is the opposite of early?",
    "What color is a ripe banana?",
    "What color do you get when you mix red and white?",
    "What does 'merci' mean in English?",
    "What does the German word 'Haus' mean in English?",
    "Name three vegetables.",
    "Name two musical instruments.",
    "Write one sentence about a dog.",
    "Write one sentence about the moon.",
    "Hi, can you help me?",
    "Good morning!",
    "Thanks a lot, goodbye.",
    "Who painted the Mona Lisa?",
    "How many months are there in a year?",
    "What is the longest river in Africa?",
    "What do plants need to grow?",
    "Rewrite this sentence more politely: Close the door.",
    "Rewrite this sentence in the past tense: She plays the piano.",
    "Explain in one sentence what a hospital is.",
    "Give me one tip for learning a language.",
    "Write a short thank-you note to a teacher.",
    "What do you call a baby cat?",
    "Suggest a healthy snack.",
    "Describe the sea in one sentence.",
    "Which animal says 'moo'?",
    "What is ice?",
    "Who wrote the novel Oliver Twist?",
    "What do cows eat?",
    "Name a season that is warm.",
)


async def rehearse(answer: Answer, count: int, concurrency: int = 16) -> list[Example]:
    """Up to `count` SFT examples in plain chat; prompts whose answer did not end are left out."""
    gate = asyncio.Semaphore(concurrency)

    async def one(prompt: str) -> Example | None:
        question: list[Message] = [{"role": "user", "content": prompt}]
        async with gate:
            try:
                said = await answer(question)
            except ModelError:
                return None
        if not said or not said.strip():
            return None
        messages = [*question, {"role": "assistant", "content": said}]
        name = content_hash(messages)[:32]
        return Example(
            id=f"ex_{name}",
            recipe=RECIPE,
            kind=ExampleKind.SFT,
            workload="general",
            task_id=f"general_{content_hash(prompt)[:16]}",
            messages=messages,
        )

    return [example for example in await asyncio.gather(*map(one, PROMPTS[:count])) if example is not None]
