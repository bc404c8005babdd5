"""Rehearsal: the base model's own answers to general prompts, so that a night of tasks does not unlearn chat.

Self-generated targets forget least (Reinforcement Fine-Tuning Naturally Mitigates Forgetting, arXiv
2507.05386; Self-Distillation Enables Continual Learning, arXiv 2601.19897): they hold the adapter to what
the base said before, and teach nothing new. Owns the prompts, none of which is in the plain-chat control, and the
file of what was answered.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from memory.errors import ModelError, TrainingError, boundary
from memory.records import Example, ExampleKind, Message, content_hash

RECIPE = "rehearsal"

ANSWER_TOKENS = 96
"""The longest answer that may end."""

Answer = Callable[[list[Message]], Awaitable[str | None]]
"""The base model's whole answer to a conversation; None when it did not come to an end."""

_KEPT = TypeAdapter(dict[str, str | None])

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


async def rehearse(answer: Answer, count: int, kept: Path | None = None, concurrency: int = 16) -> list[Example]:
    """Up to `count` SFT examples in plain chat; prompts whose answer did not end are left out.

    `kept`: the file of what the base model said before. It is asked for the rest only, so that a stage that runs again
    makes the same dataset; a question on which the engine failed is asked the next time. TrainingError when the disk
    refuses.
    """
    gate, known = asyncio.Semaphore(concurrency), _read(kept)

    async def ask(prompt: str) -> tuple[str, str | None] | None:
        async with gate:
            try:
                said = await answer([{"role": "user", "content": prompt}])
            except ModelError:
                return None
        return prompt, said

    prompts = PROMPTS[:count]
    replies = await asyncio.gather(*(ask(prompt) for prompt in prompts if prompt not in known))
    if fresh := dict(reply for reply in replies if reply is not None):
        known |= fresh
        _write(kept, known)
    return [_example(prompt, said) for prompt in prompts if (said := known.get(prompt)) and said.strip()]


def _example(prompt: str, said: str) -> Example:
    messages: list[Message] = [{"role": "user", "content": prompt}, {"role": "assistant", "content": said}]
    return Example(
        id=f"ex_{content_hash(messages)[:32]}",
        recipe=RECIPE,
        kind=ExampleKind.SFT,
        workload="general",
        task_id=f"general_{content_hash(prompt)[:16]}",
        messages=messages,
    )


def _read(kept: Path | None) -> dict[str, str | None]:
    """Prompt -> its answer, None for one that did not end; nothing from a file that is missing or damaged."""
    try:
        return _KEPT.validate_json(kept.read_bytes()) if kept is not None else {}
    except (OSError, ValidationError):
        return {}


def _write(kept: Path | None, answers: dict[str, str | None]) -> None:
    if kept is None:
        return
    with boundary(TrainingError, f"cannot write {kept}; check the disk and its permissions"):
        kept.parent.mkdir(parents=True, exist_ok=True)
        draft = kept.with_name(f"{kept.name}.draft")
        with draft.open("wb") as file:
            file.write(_KEPT.dump_json(dict(sorted(answers.items())), indent=2) + b"\n")
            file.flush()
            os.fsync(file.fileno())
        draft.replace(kept)
