"""What was served, token by token, beside what is trained: they must be the same text in the same tokens.

A chat template, a tokenizer or a codec that differs between engine and trainer makes an adapter for prompts that
nobody sends; nothing else in a night would notice before the gate. Owns which served turns the dataset carries and
the trainer's comparison. The engine's token ids are stored with every run (`memory.records.Step`).

The prompts of a run's last turn hold all its earlier turns as they are rendered for training, so they are compared
to the token. The reply itself is compared by its text and by the token that ends it: what a model samples may be cut
into other tokens than the tokenizer cuts the same text into (160 of 393 replies of SmolLM2-135M). The text of a single
one may differ as well, where the codec read what it would write otherwise (a backslash); that of most may not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from distill.runs import rendered_tools
from distill.train.render import end_of_turn, ids_of_prompt, text_of_turn
from memory.errors import TrainingError, boundary
from memory.jsonl import lines_of
from memory.records import MALFORMED, Message, Trajectory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FILE = "served.jsonl"

CHECKED = 64
"""Runs that are compared: the newest, because what matters is how prompts are served now."""

FEW = 3
"""Replies that may differ whatever their share."""


class Served(BaseModel):
    """A run's last turn as the engine saw it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    trajectory: str
    tools: list[str]
    messages: list[Message]
    """Everything before the turn."""
    prompt_token_ids: list[int]
    end_token_id: int | None
    """The reply's last token; None when something else than the model ended it."""
    reply: Message | None = None
    """The turn as it would be trained; None when something else than the model ended it, or nobody could read it."""
    reply_token_ids: list[int] = []
    """What the model said, its last token left out."""


def served_turns(
    trajectories: Iterable[Trajectory], may_enter: Callable[[Trajectory], bool] = lambda _: True, most: int = CHECKED
) -> list[Served]:
    """The newest runs' last turns, oldest first; those without token ids (other providers') are left out."""
    found: list[Served] = []
    # By time: the ids of requests with a key, batches and practice are hashes, which sort above all others.
    for trajectory in sorted(trajectories, key=lambda t: (t.started_at, t.id), reverse=True):
        step = trajectory.steps[-1] if trajectory.steps else None
        if step is None or not step.prompt_token_ids or not may_enter(trajectory):
            continue
        # A client's own stop sequence ends a reply with whatever token it is in.
        own_end = step.finish_reason == "stop" and step.token_ids and not trajectory.sampling.get("stop")
        reply = trajectory.messages[step.message] if step.message < len(trajectory.messages) else None
        readable = own_end and reply is not None and reply.get("name") != MALFORMED
        found.append(
            Served(
                trajectory=trajectory.id,
                tools=rendered_tools(trajectory),
                messages=trajectory.messages[: step.message],
                prompt_token_ids=step.prompt_token_ids,
                end_token_id=step.token_ids[-1] if own_end and step.token_ids else None,
                reply=reply if readable else None,
                reply_token_ids=step.token_ids[:-1] if readable and step.token_ids else [],
            )
        )
        if len(found) == most:
            break
    return found[::-1]


def check_served(path: Path, tokenizer: PreTrainedTokenizerBase) -> int:
    """Render the turns of a dataset's `served.jsonl` as they would be trained; returns how many there are, 0 without
    the file.

    Raises TrainingError when one comes out in other tokens than were served, or when trained turns say something else
    than served ones did or end with another token: such a model would learn prompts that it is never given.
    """
    if not path.is_file():
        return 0
    with boundary(TrainingError, f"{path} is not what the dataset wrote; build it again"):
        lines = lines_of(path.read_text(encoding="utf-8"))
        turns = [Served.model_validate_json(line) for line in lines]
    for turn in turns:
        rendered = ids_of_prompt(turn.messages, turn.tools, tokenizer)
        if rendered != turn.prompt_token_ids:
            raise TrainingError(_told(turn, rendered, tokenizer))
    _check_ends(turns, tokenizer)
    _check_replies(turns, tokenizer)
    return len(turns)


def _check_ends(turns: Sequence[Served], tokenizer: PreTrainedTokenizerBase) -> None:
    ends = Counter(turn.end_token_id for turn in turns if turn.end_token_id is not None)
    if not ends:
        return
    # The most frequent: a model may have several, and now and then uses a rare one.
    served, trained = ends.most_common(1)[0][0], end_of_turn(tokenizer)
    if served != trained:
        raise TrainingError(
            f"served replies end with {tokenizer.decode([served])!r}, trained ones would end with "
            f"{tokenizer.decode([trained])!r}: give engine and trainer the same chat template"
        )


def _check_replies(turns: Sequence[Served], tokenizer: PreTrainedTokenizerBase) -> None:
    texts = [
        (
            turn.trajectory,
            str(tokenizer.decode(turn.reply_token_ids, clean_up_tokenization_spaces=False)).strip(),
            text_of_turn(turn.reply, turn.tools).strip(),
        )
        for turn in turns
        if turn.reply is not None
    ]
    differing = [found for found in texts if found[1] != found[2]]
    if len(differing) > max(FEW, len(texts) // 2):
        run, served, trained = differing[-1]
        raise TrainingError(
            f"{len(differing)} of {len(texts)} served replies would be trained as another text, such as run {run}: "
            f"served {served[:80]!r}, trained {trained[:80]!r}; give engine and trainer the same version of Nightschool"
        )


def _told(turn: Served, rendered: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    pairs = list(zip(rendered, turn.prompt_token_ids, strict=False))
    at = next((i for i, (one, other) in enumerate(pairs) if one != other), len(pairs))
    served, trained = (tokenizer.decode(ids[at : at + 8]) for ids in (turn.prompt_token_ids, rendered))
    return (
        f"run {turn.trajectory} was served in other tokens than it would be trained in, from token {at} on: served "
        f"{served!r}, trained {trained!r}; give engine and trainer the same tokenizer and chat template"
    )
